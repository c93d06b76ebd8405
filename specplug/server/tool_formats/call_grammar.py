"""A grammar, in llguidance's dialect of Lark, of the calls that a request's tools allow, as a family writes them.

The parameters of each tool are a JSON schema document of their own. What the grammar allows, `answer_reader.py` reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

from specplug.server.tool_formats.argument_types import Schema
from specplug.server.tool_formats.brace_rules import brace_rules
from specplug.server.tool_formats.call_formats import (
    CHANNEL,
    END,
    HARMONY,
    MESSAGE,
    START,
    BracesCall,
    FieldsCall,
    Frame,
    ToolFormat,
)
from specplug.server.tool_formats.field_rules import field_rules
from specplug.server.tool_formats.lark_rules import Rules


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The control tokens of a vocabulary that matter here.

    marks  the id of each text of a format that is one control token
    free   ids of the others that an answer may contain: no end tokens
    """

    marks: Mapping[str, int]
    free: Set[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The texts around reasoning, which comes before an answer; `opened` says that the prompt ends with the first."""

    opening: str
    closing: str
    opened: bool


def calls_grammar(
    tool_format: ToolFormat,
    tools: Mapping[str, Schema],
    control: ControlTokens,
    *,
    required: bool,
    several: bool,
    reasoning: Reasoning | None = None,
) -> str:
    """The grammar of an answer.

    tools      the JSON schema of the arguments, by the function's name
    required   the answer is calls and nothing else; otherwise it is any text, and from the opening of a call on calls
    several    more than one call is allowed
    reasoning  how the model writes its reasoning, in which no call begins. Where a call is required, there is only
               reasoning that the prompt has begun
    """
    rules = Rules(control.marks)
    grammar = _Grammar(rules, tool_format, tools, several)
    if tool_format.channels:
        grammar.channels(required)
    elif required:
        rules.add("answer", grammar.written(tool_format.frames[0]))
    else:
        grammar.free_text(control)
    rules.add("start", grammar.with_reasoning(reasoning, required))
    return rules.text()


class _Grammar:
    def __init__(self, rules: Rules, tool_format: ToolFormat, tools: Mapping[str, Schema], several: bool) -> None:
        self._rules = rules
        self._format = tool_format
        self._tools = tools
        self._several = several
        self._arguments = {
            name: rules.add(f"args_{number}", rules.json(tools[name])) for number, name in enumerate(tools)
        }

    def written(self, frame: Frame) -> str:
        """All calls of a frame, as a rule's body."""
        return f"{self._rules.literal(frame.beginning)} {self._from_name_on(frame)}"

    def with_reasoning(self, reasoning: Reasoning | None, required: bool) -> str:
        """An answer with the reasoning that may precede it, as a rule's body."""
        rules = self._rules
        if reasoning is None or (required and not reasoning.opened):
            return "answer"
        rules.add("TEXT", r"/(?s:.*)/")
        closing = rules.literal(reasoning.closing)
        thought = f"TEXT {closing}" if "<[" in closing else rules.lazy("thought", f"TEXT {closing}")
        if reasoning.opened:
            rules.add("GAP", r"/[ \n]{1,4}/")
            return f"{thought} GAP? answer" if required else f"{thought} answer"
        opening = rules.literal(reasoning.opening)
        if "<[" not in opening:
            opening = rules.lazy("opening", f"/\\s*/ {opening}")
        return f"answer | {opening} {thought} answer"

    def free_text(self, control: ControlTokens) -> None:
        """Any text, in which each frame's trigger begins calls."""
        rules = self._rules
        others = sorted(control.free - set(control.marks.values()))
        rules.add("TEXT", r"/(?s:.*)/")
        rules.add("text", f"TEXT ({_ranges(others)} TEXT)*" if others else "TEXT")
        lead = rules.add("lead", f"(TEXT {_ranges(others)})*") if others else ""
        answers = ["text"]
        for number, frame in enumerate(self._format.frames):
            if frame.anchored:
                answers += self._anchored(frame, number)
                continue
            rest = rules.literal(frame.beginning[len(frame.trigger) :])
            if frame.trigger in control.marks:
                head = f"text {rules.literal(frame.trigger)}"
            else:
                head = f"{lead} {rules.lazy(f'head_{number}', f'TEXT {json.dumps(frame.trigger)}')}"
            answers.append(f"{head} {rest} {self._from_name_on(frame)}")
        rules.add("answer", " | ".join(answers))

    def channels(self, required: bool) -> None:
        """Messages on channels, of which the last may be a call."""
        rules = self._rules
        after, name = HARMONY.after, HARMONY.before
        rules.add("TEXT", r"/(?s:.*)/")
        options = [f"{rules.literal(function)} _after {arguments}" for function, arguments in self._arguments.items()]
        rules.add("_after", f"{rules.literal(after)} | {rules.literal(MESSAGE)}")
        rules.add("call", f"{rules.literal(name)} ({' | '.join(options)})")
        if required:
            rules.add("answer", "call")
            return
        spoken = " | ".join(rules.literal(f"{CHANNEL}{channel}{MESSAGE}") for channel in ("analysis", "commentary"))
        rules.add("before", f"({spoken}) TEXT {rules.literal(f'{END}{START}assistant')}")
        final = f"({spoken} | {rules.literal(f'{CHANNEL}final{MESSAGE}')}) TEXT"
        rules.add("answer", f"before* ({final} | call)")

    def _anchored(self, frame: Frame, number: int) -> list[str]:
        """Answers that begin with the first call of a frame without a trigger, one per function."""
        answers, end = [], self._rules.literal(frame.section[1])
        for index, (name, arguments) in enumerate(self._arguments.items()):
            head = self._rules.lazy(
                f"head_{number}_{index}", f'/{frame.heads}\\{{\\s*"name"\\s*:\\s*"{re.escape(name)}"/'
            )
            answers.append(f'{head} KEY {arguments} "}}" {self._more(frame)} {end}')
        self._rules.add("KEY", r'/\s*,\s*"(arguments|parameters)"\s*:\s*/')
        return answers

    def _from_name_on(self, frame: Frame) -> str:
        """The first call from its name on, and the others."""
        end = f"{']' * frame.in_list}{frame.section[1]}"
        return f"{self._named(frame)} {self._more(frame)} {self._rules.literal(end)}"

    def _more(self, frame: Frame) -> str:
        if not self._several:
            return ""
        before = self._rules.literal(f"{frame.separator}{frame.opening}{frame.body.before}")
        return f"({before} {self._named(frame)})*"

    def _named(self, frame: Frame) -> str:
        """One call from its name on, as a rule, which is made once per frame."""
        rule = f"call_{self._format.frames.index(frame)}"
        if rule in self._rules:
            return rule
        body = frame.body
        calls = []
        for index, (name, arguments) in enumerate(self._arguments.items()):
            if isinstance(body, FieldsCall):
                arguments = field_rules(self._rules, f"{rule}_{index}", body, self._tools[name])
            elif isinstance(body, BracesCall):
                arguments = brace_rules(self._rules, f"{rule}_{index}", body.quote, self._tools[name])
            before, number, after = f"{name}{body.after}".partition("#")
            head = (
                f"{self._rules.literal(before)} /[0-9]+/ {self._rules.literal(after)}"
                if number
                else (self._rules.literal(before))
            )
            calls.append(f"{head} {arguments}")
        return self._rules.add(rule, f"({' | '.join(calls)}) {self._rules.literal(body.closing + frame.closing)}")


def _ranges(ids: Sequence[int]) -> str:
    """A token of `ids`, which are sorted."""
    parts = []
    for _, group in groupby(enumerate(ids), lambda pair: pair[1] - pair[0]):
        run = [token for _, token in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"<[{','.join(parts)}]>"
