"""The fields of each request and their limits: OpenAI's fields, some of llama.cpp's, and `specplug`.

This module depends on no engine.
A field that OpenAI's API does not have is rejected, as OpenAI does. A field that has no effect here is accepted. A
field that would change the answer but is not supported is rejected unless its value asks for the default behaviour.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from specplug.corpora.folder import NAME

MAX_CHOICES = 16
MAX_PROMPTS = 16
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_BIASES = 300
MAX_STOPS = 16
MAX_CORPORA = 64
MAX_STOP_CHARS = 256

Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=False)


class SpecplugOptions(StrictModel):
    """Options of specplug for one request.

    mode       off: plain decoding; auto: drafts are verified only when measured costs say it is faster
    max_draft  largest number of draft tokens per step
    deadline   seconds for the complete answer
    details    each chunk of a stream says which text was drafted, and by which proposer
    corpora    names of the corpora to draft from; none where empty
    private    nothing of the request may be kept when the server ends
    """

    mode: Literal["off", "auto"] = "auto"
    max_draft: Annotated[int, Field(ge=0, le=256)] | None = None
    deadline: Seconds | None = None
    details: bool = False
    corpora: Annotated[list[Annotated[str, Field(max_length=255)]], Field(max_length=MAX_CORPORA)] | None = None
    private: bool = False


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class CommonRequest(StrictModel):
    """The fields that chats and text completions share."""

    model: Annotated[str, Field(max_length=512)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    grammar: str | None = None
    user: str | None = None
    specplug: SpecplugOptions = SpecplugOptions()

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS or any(not 0 < len(one) <= MAX_STOP_CHARS for one in stops):
            raise ValueError(f"up to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _biases_of_ids(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        for key in biases or {}:
            if not re.fullmatch(r"[0-9]{1,9}", key):
                raise ValueError(f"{key[:20]!r} is not a token id")
        return biases

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


class LenientModel(BaseModel):
    """Part of a conversation, or a tool. Unknown fields are ignored: clients send what other servers understand."""

    model_config = ConfigDict(extra="ignore")


class FunctionCall(LenientModel):
    """`arguments` is JSON text, as OpenAI's API has it, or an object, as some clients send it back."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(LenientModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(LenientModel):
    type: Literal["text"]
    text: str


class ChatMessage(LenientModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(LenientModel):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None

    @field_validator("parameters", mode="before")
    @classmethod
    def _none_without_a_schema(cls, parameters: Any) -> Any:
        return {} if parameters is None else parameters


class Tool(LenientModel):
    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    name: str


class NamedTool(StrictModel):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(StrictModel):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(CommonRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # OpenAI's fields that have no effect here:
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"tools has two functions named {twice}")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice names a function that is not in tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice needs tools")
        if (self.grammar is not None) + self.must_call + self.is_shaped > 1:
            raise ValueError("grammar, response_format and a forced tool exclude each other; use one")
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_schema" and wanted.json_schema is None:
            raise ValueError("response_format of type json_schema needs json_schema")
        return self

    @property
    def is_shaped(self) -> bool:
        """Whether the answer must be JSON."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def may_call_often(self) -> bool:
        """Whether an answer may have several calls; with the name of a function it is one."""
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)

    @property
    def offered(self) -> list[Function]:
        """The functions that the answer may call."""
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            return [function for function in functions if function.name == self.tool_choice.function.name]
        return functions if self.tool_choice != "none" else []


class CompletionRequest(CommonRequest):
    prompt: str | list[str] | Ids | list[Ids]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    special: bool = True
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of other than n is not supported; leave it out")
        if self.suffix:
            raise ValueError("suffix is not supported; leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported; use one of them")
        if not self.prompts:
            raise ValueError("no prompt; give at least one")
        if len(self.prompts) * self.n > MAX_PROMPTS:
            raise ValueError(f"prompts times n is more than {MAX_PROMPTS}; send several requests")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list; each is text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class AddCorpusRequest(StrictModel):
    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class TokenizeRequest(StrictModel):
    content: str
    add_special: bool = False
    parse_special: bool = True


class DetokenizeRequest(StrictModel):
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1 << 17)]
