"""The fields of Ollama's requests, as a chat request or a request for a text.

Unknown fields of messages and tools are ignored, as in chat requests.
Source: docs/api.md and api/types.go of github.com/ollama/ollama
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from specplug.server.openai_format import Json
from specplug.server.request_schema import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatRequest,
    CompletionRequest,
    LenientModel,
    RequestPart,
    Tool,
    not_text,
)
from specplug.server.translation import Request, translate


def _no_images(images: Any) -> Any:
    if images:
        raise ValueError(not_text("an image"))
    return images


Images = Annotated[list[str] | None, BeforeValidator(_no_images)]


class Options(RequestPart):
    """Options that apply to a request; those by which Ollama loads a model are ignored."""

    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | None = None
    stop: list[str] | str | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: Any = None


NAMES = {
    **{name: f"options.{name}" for name in Options.model_fields},
    "max_tokens": "options.num_predict",
    "penalty_last_n": "options.repeat_last_n",
    "response_format": "format",
    "reasoning_effort": "think",
}
"""Names of fields in the request, by those of its translation."""


class CalledFunction(LenientModel):
    name: str
    arguments: dict[str, Any] | str | None = None


class Call(LenientModel):
    id: str | None = None
    function: CalledFunction


class Message(LenientModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Images = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class AnswerRequest(RequestPart):
    """The fields that /api/chat and /api/generate share."""

    model: Annotated[str, Field(max_length=512)] | None = None
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options = Options()
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class ChatBody(AnswerRequest):
    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)] = Field(default_factory=list)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None


INSTEAD = {
    "context": "send the earlier conversation to /api/chat",
    "template": "write the whole prompt yourself, with raw: true",
}


class GenerateBody(AnswerRequest):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    images: Images = None
    raw: bool = False

    @model_validator(mode="after")
    def _is_text(self) -> GenerateBody:
        for name, instead in INSTEAD.items():
            if (self.model_extra or {}).get(name):
                raise ValueError(f"{name} is not supported; {instead}")
        return self

    @property
    def is_text(self) -> bool:
        """Whether the prompt is continued as it is, rather than answered as a message of a chat."""
        return self.raw or bool(self.suffix)


class ShowBody(RequestPart):
    model: str | None = None
    name: str | None = None


def translated_chat(body: ChatBody) -> tuple[ChatRequest, list[str]]:
    """The chat request, and the fields without a meaning. Raises UsageError."""
    tools = [tool.model_dump() for tool in body.tools or ()] or None
    return _translated(body, ChatRequest, {"messages": list(_conversation(body)), "tools": tools})


def translated_prompt(body: GenerateBody) -> tuple[ChatRequest, list[str]]:
    """The chat request with a prompt as its only message, and the fields without a meaning. Raises UsageError."""
    messages = [{"role": "system", "content": body.system}] if body.system else []
    return _translated(body, ChatRequest, {"messages": [*messages, {"role": "user", "content": body.prompt or ""}]})


def translated_text(body: GenerateBody) -> tuple[CompletionRequest, list[str]]:
    """The request for a text that continues a prompt as it is, and the fields without a meaning. Raises UsageError."""
    fields: Json = {"prompt": body.prompt or "", "suffix": body.suffix or None}
    request, ignored = _translated(body, CompletionRequest, fields)
    unread = ("system", "think", "logprobs", "top_logprobs")
    return request, ignored + [name for name in unread if getattr(body, name)]


def _translated(body: AnswerRequest, kind: type[Request], fields: Json) -> tuple[Request, list[str]]:
    given = body.options.model_dump(exclude_none=True, exclude=set(body.options.model_extra or ()))
    given["max_tokens"] = -1 if given.get("num_predict", -2) == -2 else given["num_predict"]
    given.pop("num_predict", None)
    given["penalty_last_n"] = given.pop("repeat_last_n", None)
    ignored = ["options.mirostat"] if given.pop("mirostat", 0) else []
    fields |= {**given, "model": body.model, "stream": body.stream is not False}
    if body.format:
        wanted = {"name": "answer", "schema": body.format}
        is_schema = isinstance(body.format, dict)
        fields["response_format"] = (
            {"type": "json_schema", "json_schema": wanted} if is_schema else {"type": "json_object"}
        )
    if kind is ChatRequest:
        fields |= _chat_fields(body)
    request, more = translate(body, kind, fields, NAMES)
    return request, ignored + more


def _chat_fields(body: AnswerRequest) -> Json:
    fields: Json = {}
    if isinstance(body.think, bool):
        fields["chat_template_kwargs"] = {"enable_thinking": body.think}
    elif body.think is not None:
        fields["reasoning_effort"] = body.think
    if body.logprobs or body.top_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    return fields


def _conversation(body: ChatBody) -> Iterator[Json]:
    """The messages of a chat request. Results of tools belong to the calls before them in order, or by name."""
    waiting: list[tuple[str, str]] = []
    number = 0
    for message in body.messages:
        fields: Json = {"role": message.role, "content": message.content, "reasoning_content": message.thinking}
        if message.tool_calls:
            calls: list[Json] = []
            for call in message.tool_calls:
                number += 1
                calls.append({"id": call.id or f"call{number:05d}", "function": call.function.model_dump()})
            waiting = [(call["id"], call["function"]["name"]) for call in calls]
            fields["tool_calls"] = calls
        elif message.role == "tool":
            one = next((one for one in waiting if message.tool_name in (None, one[1])), None)
            if one is not None:
                waiting.remove(one)
            call_id, name = one or ("", message.tool_name)
            fields |= {"tool_call_id": message.tool_call_id or call_id, "name": message.tool_name or name}
        yield fields
