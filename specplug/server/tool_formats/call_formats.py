"""The descriptions: how the models of each family write tool calls, recognised by the text of the chat template.

A description says nothing about particular tools. `call_grammar.py` makes a grammar of it, and `answer_reader.py` reads
by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JsonCall:
    """One JSON object: `{"name": "f", "arguments": {...}}`.

    key  the key of the arguments, as the grammar writes it; `arguments` and `parameters` are both read
    """

    key: str = "arguments"

    before = '{"name": "'
    closing = "}"

    @property
    def after(self) -> str:
        return f'", "{self.key}": '


@dataclass(frozen=True, slots=True)
class HeadedCall:
    """A header with the name, then the arguments as JSON.

    before   what the grammar writes before the name
    after    what it writes between name and arguments, with `#` for the number of the call
    divider  ends the header
    header   finds `name` in the header, and `id` where the model chooses the call's id
    marks    other texts in the header that may be control tokens
    """

    before: str
    after: str
    divider: str
    header: re.Pattern[str]
    marks: tuple[str, ...] = ()

    closing = ""


@dataclass(frozen=True, slots=True)
class FieldsCall:
    """The name, then each argument between tags: a string as it is, any other value as JSON.

    before, after  around the name
    key, value     before a key, and between key and value
    end            after a value
    closing        after the last argument
    """

    before: str
    after: str
    key: str
    value: str
    end: str
    closing: str = ""


@dataclass(frozen=True, slots=True)
class BracesCall:
    """`call:f{key:value}`: like JSON, but keys are bare and `quote` stands on both sides of a string."""

    quote: str
    before: str = "call:"

    after = closing = ""


Body = JsonCall | HeadedCall | FieldsCall | BracesCall


@dataclass(frozen=True, slots=True)
class Frame:
    """How calls stand in an answer.

    opening, closing  before and after each call's body
    section           before and after all calls
    in_list           the calls are the elements of a JSON list
    separator         between two calls
    anchored          the answer begins with the calls; elsewhere the same text is no call
    heads             regular expression of what may precede the first call, where it is anchored
    """

    body: Body
    opening: str = ""
    closing: str = ""
    section: tuple[str, str] = ("", "")
    in_list: bool = False
    separator: str = ""
    anchored: bool = False
    heads: str = ""

    @property
    def beginning(self) -> str:
        """All that stands before the name of the first call."""
        return f"{self.section[0]}{'[' * self.in_list}{self.opening}{self.body.before}"

    @property
    def trigger(self) -> str:
        """The text from which on an answer can only continue as a call; empty where the frame is anchored."""
        return "" if self.anchored else (self.section[0] or self.opening or self.body.before).strip()


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A family of models.

    signs     the template has all texts of one of these groups
    frames    the first one is written where a call is required; all are read
    channels  the answer consists of messages on channels (gpt-oss)
    """

    name: str
    signs: tuple[tuple[str, ...], ...]
    frames: tuple[Frame, ...]
    channels: bool = False

    def markers(self) -> Iterator[str]:
        """The texts that may be control tokens of the model's vocabulary."""
        for frame in self.frames:
            texts = [*frame.section, frame.opening, frame.closing]
            body = frame.body
            if isinstance(body, HeadedCall):
                texts += [body.divider, *body.marks]
            if isinstance(body, FieldsCall):
                texts += [body.before, body.after, body.key, body.value, body.end, body.closing]
            if isinstance(body, BracesCall):
                texts += [body.quote]
            for text in texts:
                yield from MARKER.findall(text)
        if self.channels:
            yield from CHANNEL_MARKERS


MARKER = re.compile(r"<[^<>\n]+>|\[[A-Z_]+\]")
CHANNEL, MESSAGE, CONSTRAIN = "<|channel|>", "<|message|>", "<|constrain|>"
START, END, CALL, RETURN = "<|start|>", "<|end|>", "<|call|>", "<|return|>"
CHANNEL_MARKERS = (CHANNEL, MESSAGE, CONSTRAIN, START, END, CALL, RETURN)
NAME = r"[a-zA-Z0-9_.-]{1,64}"

BARE = Frame(JsonCall(), anchored=True, separator="\n", heads=r"\s*")
FENCED = Frame(
    JsonCall(),
    section=("```json\n", "\n```"),
    separator="\n",
    anchored=True,
    heads=r"\s*```(json|tool_call)?\s*",
)
LISTED = Frame(JsonCall(), section=("[TOOL_CALLS]", ""), in_list=True, separator=", ")
SPACED = Frame(JsonCall(), section=("[TOOL_CALLS] ", ""), in_list=True, separator=", ")
QWEN_FIELDS = ("<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>")
HARMONY = HeadedCall(
    f"{CHANNEL}commentary to=functions.",
    f" {CONSTRAIN}json{MESSAGE}",
    MESSAGE,
    re.compile(rf"to=functions\.(?P<name>{NAME})"),
)

FORMATS = (
    ToolFormat("harmony", ((CHANNEL, MESSAGE),), (Frame(HARMONY, closing=CALL),), channels=True),
    ToolFormat(
        "kimi",
        (("<|tool_call_begin|>",), ("<|im_middle|>", "tool_declare")),
        (
            Frame(
                HeadedCall(
                    "functions.",
                    ":#<|tool_call_argument_begin|>",
                    "<|tool_call_argument_begin|>",
                    re.compile(rf"(?P<id>(functions\.)?(?P<name>{NAME})(:\d+)?)"),
                ),
                "<|tool_call_begin|>",
                "<|tool_call_end|>",
                ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            ),
        ),
    ),
    ToolFormat(
        "qwen-xml",
        (("<function=", "<parameter="),),
        (
            Frame(
                FieldsCall(*QWEN_FIELDS),
                "<tool_call>\n",
                "\n</tool_call>",
                separator="\n",
            ),
            Frame(FieldsCall(*QWEN_FIELDS), separator="\n"),
            BARE,
            FENCED,
        ),
    ),
    ToolFormat(
        "glm",
        (("<arg_key>", "<arg_value>"),),
        (
            Frame(
                FieldsCall("", "\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
                "<tool_call>",
                "</tool_call>",
                separator="\n",
            ),
            BARE,
            FENCED,
        ),
    ),
    ToolFormat(
        "gemma",
        (("<|tool_call>", "<tool_call|>"),),
        (Frame(BracesCall('<|"|>'), "<|tool_call>", "<tool_call|>"), BARE, FENCED),
    ),
    ToolFormat(
        "function-gemma",
        (("<start_function_call>",),),
        (Frame(BracesCall("<escape>"), "<start_function_call>", "<end_function_call>"), BARE, FENCED),
    ),
    ToolFormat(
        "mistral-args",
        (("[TOOL_CALLS]", "[ARGS]"),),
        (
            Frame(
                HeadedCall(
                    "", "[ARGS]", "[ARGS]", re.compile(rf"(?P<name>{NAME})(\[CALL_ID\](?P<id>\w+))?"), ("[CALL_ID]",)
                ),
                "[TOOL_CALLS]",
            ),
            LISTED,
            BARE,
            FENCED,
        ),
    ),
    ToolFormat("mistral-spaced", (("[TOOL_CALLS] [",),), (SPACED, BARE, FENCED)),
    ToolFormat("mistral", (("[TOOL_CALLS]",),), (LISTED, BARE, FENCED)),
    ToolFormat(
        "hermes",
        (("<tool_call>",),),
        (Frame(JsonCall(), "<tool_call>\n", "\n</tool_call>", separator="\n"), LISTED, BARE, FENCED),
    ),
    ToolFormat("fenced", (("```json", '"name"', "tools"), ("```tool_call",)), (FENCED, BARE)),
    ToolFormat(
        "llama",
        (("<|python_tag|>",), ("<|start_header_id|>", "tools")),
        (
            Frame(JsonCall("parameters"), anchored=True, separator="; ", heads=r"\s*"),
            Frame(JsonCall("parameters"), section=("<|python_tag|>", ""), separator="; "),
            FENCED,
        ),
    ),
)
HERMES = next(one for one in FORMATS if one.name == "hermes")


def recognise(template: str) -> ToolFormat:
    """The family of a chat template; Hermes' where it shows none, since the server then describes the tools itself."""
    for one in FORMATS:
        if any(all(sign in template for sign in group) for group in one.signs):
            return one
    return HERMES
