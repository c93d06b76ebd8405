"""Response formats for `SpeculativeLlama`: constraints of llguidance as one of llama-cpp-python's logits processors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import LogitsProcessorList

from specplug.constraints.grammar_text import grammar_text
from specplug.core import IntArray
from specplug.engines.llama_cpp.guidance_grammar import Guidance
from specplug.engines.llama_cpp.guided_text import GuidedText
from specplug.engines.llama_cpp.token_matcher import TokenMatcher
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Sampling


class ConstraintProcessor:
    """Masks the logits of one answer. llama-cpp-python calls it for each token, with all tokens before it."""

    def __init__(self, text: GuidedText, end_token: int) -> None:
        """
        text       at its beginning; taken over
        end_token  ends an answer whose constraint is not kept
        """
        self._text = text
        self._end_token = end_token
        self._seen: int | None = None
        self.failure: SpecplugError | None = None
        """Why the constraint is not kept: llama.cpp calls from C, where no exception can pass."""

    def __call__(self, input_ids: IntArray, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self.failure is not None:
            return self._end(scores)
        try:
            new = input_ids[len(input_ids) if self._seen is None else self._seen :]
            self._text.advance(new.tolist())
            allowed = np.unpackbits(self._text.mask(), count=len(scores), bitorder="little").astype(bool)
        except (SpecplugError, ValueError) as error:
            self.failure = SpecplugError(f"the constraint cannot be kept: {error}")
            return self._end(scores)
        self._seen = len(input_ids)
        return np.where(allowed, scores, np.float32(-np.inf))

    def _end(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits that leave the end of the answer only."""
        ended = np.full_like(scores, -np.inf)
        ended[self._end_token] = 0.0
        return ended

    def matcher_after(self, token: int) -> TokenMatcher | None:
        """The constraint after `token`, which was just sampled and is allowed; None after a failure or at a limit."""
        if self.failure is not None:
            return None
        matcher = self._text.for_drafts()
        try:
            matcher.advance([token])
        except (ValueError, SpecplugError):  # a limit that the drafts have met, and the answer perhaps never meets
            return None
        return matcher


def create_constrained(
    create: Callable[..., Any], guidance: Guidance, options: dict[str, Any]
) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """The result of `create(**options)`, constrained by the option `response_format`.

    create    `create_chat_completion` of llama-cpp-python
    guidance  llguidance for the model
    Raises UsageError for a schema that is wrong or, where strict, cannot be enforced.
    """
    sampling = _sampling(options.get("response_format"))
    if sampling is None:
        return create(**options)  # type: ignore[no-any-return]
    if options.get("grammar") is not None:
        raise UsageError("grammar and response_format were given at once; use one of them")
    grammar = grammar_text(sampling)
    assert grammar is not None
    processor = ConstraintProcessor(guidance.open(grammar), guidance.end_token)
    others = options.get("logits_processor") or ()
    answer = create(
        **{**options, "response_format": None, "logits_processor": LogitsProcessorList([*others, processor])}
    )
    if isinstance(answer, Mapping):
        _check(processor)
        return {**answer, "specplug": {"warnings": list(grammar.warnings)}}
    return _checked(answer, processor)


def constraint_after(token: int, processors: Any) -> TokenMatcher | None:
    """The constraint of an answer after its first token; None without one among its logits processors."""
    found = next((one for one in processors or () if isinstance(one, ConstraintProcessor)), None)
    return found.matcher_after(token) if found is not None else None


def _sampling(response_format: Any) -> Sampling | None:
    """What an option `response_format` demands, in OpenAI's form or llama-cpp-python's; None for text."""
    kind = (response_format or {}).get("type")
    if kind == "json_object":
        return Sampling(json_schema=json.dumps(response_format.get("schema", {"type": "object"})))
    if kind == "json_schema":
        wanted = response_format.get("json_schema")
        if not isinstance(wanted, Mapping):
            raise UsageError("response_format of type json_schema needs json_schema")
        schema = wanted.get("schema", {"type": "object"})
        return Sampling(json_schema=json.dumps(schema), strict=bool(wanted.get("strict")))
    if kind in (None, "text"):
        return None
    raise UsageError(f"response_format {kind!r} is not supported; use text, json_object or json_schema")


def _checked(chunks: Iterator[dict[str, Any]], processor: ConstraintProcessor) -> Iterator[dict[str, Any]]:
    for chunk in chunks:
        _check(processor)
        yield chunk


def _check(processor: ConstraintProcessor) -> None:
    if processor.failure is not None:
        raise processor.failure
