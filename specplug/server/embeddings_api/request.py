"""The fields of a request for embeddings, and their limits. This module depends on no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from specplug.server.request_schema import Ids, RequestPart

MAX_TEXTS = 2048
"""As in OpenAI's API."""


class EmbeddingRequest(RequestPart):
    """`input` is llama-server's `content`, too."""

    input: str | list[str] | Ids | list[Ids]
    model: Annotated[str, Field(max_length=512)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _translated(cls, body: Any) -> Any:
        if isinstance(body, Mapping) and body.get("input") is None and "content" in body:
            return {**{name: value for name, value in body.items() if name != "content"}, "input": body["content"]}
        return body

    @model_validator(mode="after")
    def _check_inputs(self) -> EmbeddingRequest:
        if not 0 < len(self.inputs) <= MAX_TEXTS:
            raise ValueError(f"input has {len(self.inputs)} texts; send 1 to {MAX_TEXTS}")
        if not all(self.inputs):
            raise ValueError("input has an empty text; leave it out")
        return self

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts as a list; each is text or token ids."""
        if isinstance(self.input, str):
            return [self.input]
        if self.input and isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)  # type: ignore[arg-type]
