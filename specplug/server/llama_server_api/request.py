"""The fields of llama-server's own requests, /completion and /infill, and their limits.

This module depends on no engine. Source: tools/server/README.md of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from specplug.generation.fill_in import OtherFile
from specplug.server.request_fields import MOST_TOKENS
from specplug.server.request_schema import MAX_PROMPTS, CommonRequest, MaxTokens, RequestPart

MAX_PROBS = 100
MAX_FILES = 256
MAX_FIELDS = 100

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Prompt = str | list[TokenId | str]
"""A text, or token ids and texts in any order."""


class LlamaServerRequest(CommonRequest):
    """The fields that both share. Without a limit an answer goes on until it ends itself."""

    max_tokens: MaxTokens | None = None
    n_probs: Annotated[int, Field(ge=0, le=MAX_PROBS)] = 0
    return_tokens: bool = False
    response_fields: Annotated[list[str], Field(max_length=MAX_FIELDS)] | None = None

    @property
    def limit(self) -> int | None:
        return None if self.max_tokens == MOST_TOKENS else self.max_tokens


class LlamaCompletionRequest(LlamaServerRequest):
    prompt: str | list[TokenId | str | list[TokenId | str]]

    @model_validator(mode="after")
    def _check_prompts(self) -> LlamaCompletionRequest:
        if not self.prompts:
            raise ValueError("no prompt; give at least one")
        if len(self.prompts) * self.n > MAX_PROMPTS:
            raise ValueError(f"prompts times n is more than {MAX_PROMPTS}; send several requests")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts: a list that has token ids is one of them, any other list has one per entry."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if any(isinstance(part, int) for part in self.prompt):
            mixed: Any = [part for part in self.prompt if not isinstance(part, list)]
            return [mixed] if len(mixed) == len(self.prompt) else [_alone(part) for part in self.prompt]
        return [_alone(part) for part in self.prompt]


class OtherFileField(RequestPart):
    text: str
    filename: str = "tmp"


class InfillRequest(LlamaServerRequest):
    input_prefix: str
    input_suffix: str
    input_extra: Annotated[list[OtherFileField], Field(max_length=MAX_FILES)] = Field(default_factory=list)
    prompt: str = ""

    @property
    def files(self) -> list[OtherFile]:
        return [OtherFile(one.text, one.filename) for one in self.input_extra]


def _alone(part: Any) -> Prompt:
    return [part] if isinstance(part, int) else part
