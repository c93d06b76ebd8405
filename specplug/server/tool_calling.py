"""Tool calls of one server: what constrains an answer that may call, and what reads the calls in it.

This module depends on no engine: it gets the model's chat template and the texts of its control tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from specplug.constraints.grammar_text import grammar_text
from specplug.errors import UsageError
from specplug.generation.answers import Sampling
from specplug.server.request_schema import ChatRequest
from specplug.server.tool_formats.answer_reader import AnswerReader
from specplug.server.tool_formats.call_formats import HERMES, recognise
from specplug.server.tool_formats.call_grammar import ControlTokens, Reasoning, calls_grammar
from specplug.server.tool_formats.parameters import Parameters, prepare


@dataclass(frozen=True, slots=True)
class CallPlan:
    """What one request's tools mean for its answers.

    lark        the grammar that constrains them; None where nothing does, or something else of the request
    new_reader  opens a reader of one answer; None where the answer is nothing but text
    shown       texts of the control tokens that the reader must see
    warnings    what of the tools' schemas is not enforced, one line each
    """

    lark: str | None = None
    new_reader: Callable[[], AnswerReader] | None = None
    shown: Mapping[int, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class ToolCalling:
    """How the model of a server calls tools."""

    def __init__(
        self,
        chat_template: str,
        control_token: Callable[[str], int | None],
        free: frozenset[int] = frozenset(),
        reasoning_marks: Sequence[str] = (),
    ) -> None:
        """
        chat_template  empty where the model has none
        control_token  the id of the control token with a text; None where there is none
        free           ids of the control tokens that do not end an answer
        reasoning_marks
                       the texts around reasoning, if the model writes some
        """
        self.carried = "tools" in chat_template
        """Whether the chat template has a place for tools."""
        self._format = recognise(chat_template) if self.carried else HERMES
        self.has_channels = bool(self._format.channels)
        """Whether answers consist of channels, of which one is for reasoning."""
        found = {text: control_token(text) for text in (*self._format.markers(), *reasoning_marks)}
        marks = {text: token for text, token in found.items() if token is not None}
        self._control = ControlTokens(marks, free)
        self._shown = {token: text.encode() for text, token in marks.items()}

    def plan(self, body: ChatRequest, reasoning: Reasoning | None = None) -> CallPlan:
        """What constrains an answer, after its `reasoning`, and reads it.

        Raises UsageError, with the tool's name, for parameters that are no schema, or strict and not enforceable.

        It compiles the schemas, which takes milliseconds for each tool.
        """
        if not body.offered and not self._format.channels:
            return CallPlan()
        written = self._format.frames[0].body
        tools = {one.name: prepare(one, written, required=body.must_call) for one in body.offered}
        constrained = bool(tools) and not body.constraints
        return CallPlan(
            self._grammar(body, tools, reasoning) if constrained else None,
            lambda: AnswerReader(
                self._format,
                {name: one.schema for name, one in tools.items()},
                several=body.may_call_often,
                whole_calls=not constrained,
            ),
            self._shown,
            _warnings(tools, body.constraints),
        )

    def _grammar(self, body: ChatRequest, tools: Mapping[str, Parameters], reasoning: Reasoning | None) -> str:
        """The grammar of all tools. Raises UsageError with the name of the tool that does not compile, if it is one."""
        try:
            return self._checked(body, tools, reasoning)
        except UsageError as error:
            for name, one in tools.items():
                try:
                    self._checked(body, {name: one}, reasoning)
                except UsageError as its_own:
                    raise UsageError(f"tools: {name}: {its_own}") from its_own
            raise UsageError(f"tools: all of them together: {error}") from error

    def _checked(self, body: ChatRequest, tools: Mapping[str, Parameters], reasoning: Reasoning | None) -> str:
        lark = calls_grammar(
            self._format,
            {name: one.schema for name, one in tools.items()},
            self._control,
            required=body.must_call,
            several=body.may_call_often,
            reasoning=reasoning,
        )
        grammar_text(Sampling(lark=lark))
        return lark


def _warnings(tools: Mapping[str, Parameters], others: Sequence[str]) -> tuple[str, ...]:
    """What of the tools is not enforced, beside the `others`, the fields that constrain the answer."""
    if tools and others:
        return (f"tools: calls are not enforced, as {others[0]} constrains the answer",)
    return tuple(warning for one in tools.values() for warning in one.warnings)
