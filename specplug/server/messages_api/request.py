"""The fields of Anthropic's requests, as a chat request.

Unknown fields of conversations and tools are ignored, as in chat requests.
Source: https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from specplug.server.openai_format import Json
from specplug.server.request_schema import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatRequest,
    FunctionName,
    LenientModel,
    RequestPart,
    not_text,
)
from specplug.server.translation import translate

BILLING = "x-anthropic-billing-header:"
"""Claude Code begins its system prompt with a line of this name, whose text changes with every request. It is not for
the model, and no prompt that begins with it would ever be found in the cache."""

NAMES = {"stop": "stop_sequences", "response_format": "output_config.format"}
"""Names of fields in the request, by those of a chat request."""


class Text(LenientModel):
    type: Literal["text"] = "text"
    text: str


class Thinking(LenientModel):
    type: Literal["thinking"]
    thinking: str = ""


class HiddenThinking(LenientModel):
    type: Literal["redacted_thinking"]


class TextSource(LenientModel):
    type: Literal["text"]
    data: str


class Document(LenientModel):
    type: Literal["document"]
    source: TextSource
    title: str | None = None

    @property
    def text(self) -> str:
        return f"{self.title}\n{self.source.data}" if self.title else self.source.data


class ToolUse(LenientModel):
    type: Literal["tool_use"]
    id: str = ""
    name: str
    input: dict[str, Any] | None = None


def _blocks(*kinds: str) -> BeforeValidator:
    """A text becomes a list of one block; other blocks than those of `kinds` are refused by their name."""

    def check(content: Any) -> Any:
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        for block in content if isinstance(content, list) else ():
            kind = block.get("type") if isinstance(block, dict) else None
            if isinstance(kind, str) and kind not in kinds:
                raise ValueError(not_text(kind))
        return content

    return BeforeValidator(check)


Texts = Annotated[list[Text], _blocks("text")]


class ToolResult(LenientModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[list[Annotated[Text | Document, Field(discriminator="type")]], _blocks("text", "document")] = (
        Field(default_factory=list)
    )
    is_error: bool | None = None


Block = Annotated[
    Text | Thinking | HiddenThinking | Document | ToolUse | ToolResult,
    Field(discriminator="type"),
]
KINDS = ("text", "thinking", "redacted_thinking", "document", "tool_use", "tool_result")


class Message(LenientModel):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], _blocks(*KINDS)]


class CustomTool(LenientModel):
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ServerTool(LenientModel):
    """A tool whose schema the model knows, or that Anthropic's servers run, such as web search."""

    type: str
    name: str


def _kind(tool: Any) -> str:
    is_server_tool = isinstance(tool, dict) and "type" in tool and "input_schema" not in tool
    return "server" if is_server_tool and tool["type"] != "custom" else "custom"


AnyTool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[ServerTool, Tag("server")],
    Discriminator(_kind),
]


class ToolChoice(RequestPart):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingWish(RequestPart):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class OutputFormat(RequestPart):
    type: Literal["json_schema"]
    schema_: dict[str, Any] | bool = Field(alias="schema")


class OutputConfig(RequestPart):
    effort: str | None = None
    format: OutputFormat | None = None


class MessageRequest(RequestPart):
    model: Annotated[str, Field(max_length=512)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Texts | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingWish | None = None
    output_config: OutputConfig | None = None
    # Fields that have no effect here:
    metadata: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    service_tier: str | None = None


def translated(body: MessageRequest) -> tuple[ChatRequest, list[str]]:
    """The chat request, and the fields without a meaning. Raises UsageError."""
    choice, config = body.tool_choice, body.output_config
    custom = [tool for tool in body.tools or () if isinstance(tool, CustomTool)]
    fields: Json = {
        "model": body.model,
        "messages": list(_conversation(body)),
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "stream": body.stream,
        "tools": [_tool(tool) for tool in custom] or None,
    }
    if choice is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        fields["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
        if choice.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if config is not None and config.effort is not None:
        fields["reasoning_effort"] = config.effort
    if config is not None and config.format is not None:
        schema = {"name": "answer", "schema": config.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.thinking is not None and body.thinking.type in ("enabled", "disabled"):
        fields["chat_template_kwargs"] = {"enable_thinking": body.thinking.type == "enabled"}
    chat, ignored = translate(body, ChatRequest, fields, NAMES)
    return chat, ignored + [f"tools.{tool.type}" for tool in body.tools or () if isinstance(tool, ServerTool)]


def _conversation(body: MessageRequest) -> Iterator[Json]:
    """The messages of a chat request. A result of a tool gets the name of the tool."""
    system = [_without_billing(block.text) for block in body.system or ()]
    if system := [text for text in system if text]:
        yield {"role": "system", "content": "\n\n".join(system)}
    tools: dict[str, str] = {}
    for message in body.messages:
        if message.role == "assistant":
            yield _assistant(message)
            tools |= {block.id: block.name for block in message.content if isinstance(block, ToolUse)}
        else:
            yield from _others(message, tools)


def _without_billing(text: str) -> str:
    return text.partition("\n")[2].lstrip("\n") if text.startswith(BILLING) else text


def _assistant(message: Message) -> Json:
    texts = [block.text for block in message.content if isinstance(block, Text | Document)]
    thoughts = [block.thinking for block in message.content if isinstance(block, Thinking)]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input or {}}}
        for block in message.content
        if isinstance(block, ToolUse)
    ]
    return {
        "role": "assistant",
        "content": "".join(texts),
        "reasoning_content": "".join(thoughts) or None,
        "tool_calls": calls or None,
    }


def _others(message: Message, tools: dict[str, str]) -> Iterator[Json]:
    """Results of tools are messages of their own; texts between them are one each."""
    texts: list[str] = []
    for block in message.content:
        if isinstance(block, Text | Document):
            texts.append(block.text)
        elif isinstance(block, ToolResult):
            if texts:
                yield {"role": message.role, "content": "\n\n".join(texts)}
                texts = []
            content = "\n\n".join(inner.text for inner in block.content)
            called = {"name": tools.get(block.tool_use_id), "tool_call_id": block.tool_use_id}
            yield {"role": "tool", "content": f"Error: {content}" if block.is_error else content, **called}
    if texts or not message.content:
        yield {"role": message.role, "content": "\n\n".join(texts)}


def _tool(tool: CustomTool) -> Json:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {**function, "strict": tool.strict}}
