"""The fields of each request and their limits: OpenAI's fields, some of other servers, and `specplug`.

This module depends on no engine.
Unknown fields are kept apart, so that the server can say what it ignores, or refuse it. A limit is checked only where
it constrains.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from specplug.corpora.folder import NAME
from specplug.server.request_fields import translated, without_nulls

MAX_CHOICES = 16
MAX_PROMPTS = 16
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_BIASES = 300
MAX_STOPS = 16
MAX_CORPORA = 64
MAX_STOP_CHARS = 256
MAX_CHOICE_TEXTS = 256
DEFAULT_COMPLETION_TOKENS = 16
"""Tokens of a text completion whose request names no number, as in OpenAI's API."""

Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]
MaxTokens = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""Tokens of a text completion at most; 0 evaluates the prompt alone."""
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]


class RequestPart(BaseModel):
    """A part of a request, in which null means unset. Unknown fields are in `model_extra`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, part: Any) -> Any:
        return without_nulls(part)


class SpecplugOptions(RequestPart):
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


class StreamOptions(RequestPart):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(RequestPart):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestPart):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class CommonRequest(RequestPart):
    """The fields that chats and text completions share."""

    model: Annotated[str, Field(max_length=512)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timings_per_token: bool = False
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    penalty_last_n: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[Ids, Field(max_length=MAX_STOPS)] = Field(default_factory=list)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    lark: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)] | None = None
    response_format: ResponseFormat | None = None
    user: Any = None
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

    @model_validator(mode="before")
    @classmethod
    def _translated(cls, body: Any) -> Any:
        return translated(body)

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_schema" and wanted.json_schema is None:
            raise ValueError("response_format of type json_schema needs json_schema")
        if len(self.constraints) > 1:
            raise ValueError(f"{' and '.join(self.constraints)} exclude each other; use one")
        return self

    @property
    def constraints(self) -> list[str]:
        """The fields that constrain the text of an answer."""
        names = ("grammar", "json_schema", "regex", "lark", "choice")
        return [name for name in names if getattr(self, name) is not None] + ["response_format"] * self.is_shaped

    @property
    def is_shaped(self) -> bool:
        """Whether `response_format` asks for JSON."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most; None for as many as the context has room for."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


TEMPLATE_NAMES = {
    *("messages", "tools", "functions", "function_call", "tool_choice", "add_generation_prompt"),
    *("eos_token", "bos_token", "raise_exception", "strftime_now", "self"),
}
"""Variables of chat templates that the server sets itself."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a message that are text."""

UNUSED_PARTS = ("thinking", "redacted_thinking", "reasoning", "refusal")
"""Types of parts that clients send back, and that are no part of a prompt."""


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
"""OpenAI permits 64 characters, Anthropic 128."""


def not_text(kind: str) -> str:
    """What is said of a part of a message that is no text."""
    return f"{kind[:50]} is not supported; this server takes text only"


class LenientModel(BaseModel):
    """Part of a conversation, or a tool. Unknown fields are ignored: clients send what other servers understand."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, part: Any) -> Any:
        return without_nulls(part)


class FunctionCall(LenientModel):
    """`arguments` is JSON text, as OpenAI's API has it, or an object, as some clients send it back."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(LenientModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(LenientModel):
    type: Literal["text", "input_text", "output_text"] = "text"
    text: str


class ChatMessage(LenientModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = Field(None, validation_alias=AliasChoices("reasoning_content", "reasoning"))

    @field_validator("content", mode="before")
    @classmethod
    def _only_text(cls, content: Any) -> Any:
        """Clients send back parts of earlier answers; only those with text belong into a prompt."""
        if not isinstance(content, list):
            return content
        parts = [part for part in content if not (isinstance(part, dict) and part.get("type") in UNUSED_PARTS)]
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in TEXT_PARTS:
                raise ValueError(not_text(kind))
        return parts

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(LenientModel):
    name: FunctionName
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


class NamedFunction(RequestPart):
    name: str


class NamedTool(RequestPart):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(CommonRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    reasoning_format: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # OpenAI's fields that have no effect here:
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _free_names(cls, variables: dict[str, Any] | None) -> dict[str, Any] | None:
        taken = sorted(TEMPLATE_NAMES & set(variables or {}))
        if taken:
            raise ValueError(f"{taken[0]} is set by the server; leave it out")
        return variables

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
        if self.must_call and self.constraints:
            raise ValueError(f"{self.constraints[0]} and a forced tool exclude each other; use one")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

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
    max_tokens: MaxTokens | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    special: bool = True
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of other than n is not supported; leave it out")
        if self.suffix is not None and self.echo:
            raise ValueError("suffix and echo exclude each other; use one")
        if not self.prompts:
            raise ValueError("no prompt; give at least one")
        if len(self.prompts) * self.n > MAX_PROMPTS:
            raise ValueError(f"prompts times n is more than {MAX_PROMPTS}; send several requests")
        return self

    @property
    def limit(self) -> int | None:
        default = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return default

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list; each is text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class AddCorpusRequest(RequestPart):
    """It has no other fields: a corpus is named, and never found by a path."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class TokenizeRequest(RequestPart):
    content: str
    add_special: bool = False
    parse_special: bool = True


class DetokenizeRequest(RequestPart):
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1 << 17)]
