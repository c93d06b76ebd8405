"""The fields of requests for a response, as a chat request.

Unknown fields of items and tools are ignored, as in chat requests.
Source: https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from specplug.server.openai_format import Json
from specplug.server.request_schema import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatRequest,
    FunctionName,
    LenientModel,
    RequestPart,
    StreamOptions,
    not_text,
)
from specplug.server.translation import translate

NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Names of fields in the request, by those of a chat request."""

LOGPROBS = "message.output_text.logprobs"
"""The value of `include` that asks for log probabilities."""

INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
"""Values of `include` that are taken; reasoning is never encrypted here."""


class Text(LenientModel):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class Refusal(LenientModel):
    type: Literal["refusal"]
    refusal: str = ""

    @property
    def text(self) -> str:
        return self.refusal


TEXT_KINDS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def _parts(content: Any) -> Any:
    """A text becomes a list of one part; parts that are no text are refused by their name."""
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}]
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in (*TEXT_KINDS, "refusal"):
            raise ValueError(not_text(kind))
    return content


Parts = Annotated[list[Annotated[Text | Refusal, Field(discriminator="type")]], BeforeValidator(_parts)]


class Message(LenientModel):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class FunctionCall(LenientModel):
    type: Literal["function_call"]
    call_id: str = ""
    name: str
    arguments: str | dict[str, Any] | None = None


class FunctionCallOutput(LenientModel):
    type: Literal["function_call_output"]
    call_id: str = ""
    output: Parts


class Reasoning(LenientModel):
    """What an earlier answer reasoned; its summary where the text is not there."""

    type: Literal["reasoning"]
    summary: Parts | None = None
    content: Parts | None = None


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(_kind),
]
ITEM_KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _items(given: Any) -> Any:
    """A text becomes the message of a user; items of other kinds are refused by their name."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    for item in given if isinstance(given, list) else ():
        kind = _kind(item)
        if isinstance(kind, str) and kind not in ITEM_KINDS:
            raise ValueError(f"items of type {kind[:50]} are not supported; use {', '.join(ITEM_KINDS)}")
    return given


class FunctionTool(LenientModel):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OtherTool(LenientModel):
    """A tool that OpenAI's servers run, or one whose calls are not JSON."""

    type: str


def _tool_kind(tool: Any) -> str:
    return "function" if _kind(tool) == "function" else "other"


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[OtherTool, Tag("other")], Discriminator(_tool_kind)
]


class NamedTool(RequestPart):
    type: Literal["function"]
    name: str


class AllowedTools(RequestPart):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedTool]


class Format(RequestPart):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(RequestPart):
    format: Format | None = None
    verbosity: str | None = None


class ReasoningOptions(RequestPart):
    effort: str | None = None
    summary: str | None = None


class ResponseRequest(RequestPart):
    model: Annotated[str, Field(max_length=512)] | None = None
    input: Annotated[
        list[Item], BeforeValidator(_items, json_schema_input_type=str | list[Any]), Field(max_length=MAX_MESSAGES)
    ]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")] | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    # Fields that are returned and have no effect:
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    truncation: str | None = None
    # Nothing is kept here, so these are taken only where they ask for that:
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None

    @model_validator(mode="after")
    def _keeps_nothing(self) -> ResponseRequest:
        for name in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported; this server keeps nothing, so send the whole input")
        if self.background:
            raise ValueError("background is not supported; this server keeps no responses")
        return self

    @property
    def allowed(self) -> list[FunctionTool]:
        """The functions that the prompt describes."""
        functions = [tool for tool in self.tools or () if isinstance(tool, FunctionTool)]
        if isinstance(self.tool_choice, AllowedTools):
            names = {tool.name for tool in self.tool_choice.tools}
            return [function for function in functions if function.name in names]
        return functions


def translated(body: ResponseRequest) -> tuple[ChatRequest, list[str]]:
    """The chat request, and the fields without a meaning. Raises UsageError."""
    included = body.include or ()
    choice = body.tool_choice
    fields: Json = {
        "model": body.model,
        "messages": list(_conversation(body)),
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": body.stream,
        "tools": [_tool(tool) for tool in body.allowed] or None,
        "parallel_tool_calls": body.parallel_tool_calls,
    }
    if body.top_logprobs is not None or LOGPROBS in included:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    if isinstance(choice, NamedTool):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice is not None:
        fields["tool_choice"] = choice.mode if isinstance(choice, AllowedTools) else choice
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    chat, ignored = translate(body, ChatRequest, fields, NAMES)
    ignored += [f"tools.{tool.type}" for tool in body.tools or () if isinstance(tool, OtherTool)]
    ignored += [f"include.{name}" for name in included if name not in INCLUDED]
    ignored += ["store"] if body.store else []
    ignored += ["truncation"] if body.truncation not in (None, "disabled") else []
    return chat, ignored


def _response_format(wanted: Format) -> Json:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    fields = {"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": fields}


def _conversation(body: ResponseRequest) -> Iterator[Json]:
    """The messages of a chat request. Reasoning, text and calls of one answer become one message."""
    if body.instructions:
        yield {"role": "system", "content": body.instructions}
    names = {item.call_id: item.name for item in body.input if isinstance(item, FunctionCall)}
    answer: Json | None = None
    for item in body.input:
        if answer is not None and not _continues(answer, item):
            yield answer
            answer = None
        if isinstance(item, FunctionCallOutput):
            called = {"tool_call_id": item.call_id, "name": names.get(item.call_id)}
            yield {"role": "tool", "content": _text(item.output), **called}
        elif isinstance(item, Message) and item.role != "assistant":
            yield {"role": item.role, "content": _text(item.content)}
        else:
            answer = answer or {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
            _extend(answer, item)
    if answer is not None:
        yield answer


def _continues(answer: Json, item: Message | FunctionCall | FunctionCallOutput | Reasoning) -> bool:
    """Whether an item is a further part of the answer so far: reasoning comes first, and calls last."""
    if isinstance(item, FunctionCall):
        return True
    if isinstance(item, Reasoning):
        return not answer["content"] and not answer["tool_calls"]
    return isinstance(item, Message) and item.role == "assistant" and not answer["content"] and not answer["tool_calls"]


def _extend(answer: Json, item: Message | FunctionCall | Reasoning) -> None:
    if isinstance(item, FunctionCall):
        function = {"name": item.name, "arguments": item.arguments}
        answer["tool_calls"].append({"id": item.call_id, "type": "function", "function": function})
    elif isinstance(item, Reasoning):
        answer["reasoning_content"] += _text(item.content or item.summary or ())
    else:
        answer["content"] += _text(item.content)


def _text(parts: Iterable[Text | Refusal]) -> str:
    return "".join(part.text for part in parts)


def _tool(tool: FunctionTool) -> Json:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {**function, "strict": tool.strict}}
