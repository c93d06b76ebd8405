"""Translate a request's sampling fields into `Sampling`, with OpenAI's and llama.cpp's defaults.

This module depends on no engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from specplug.constraints.grammar_text import grammar_text
from specplug.constraints.lark_documents import prepared_lark
from specplug.errors import UsageError
from specplug.generation.answers import Sampling
from specplug.server.llama_server_api.request import LlamaServerRequest
from specplug.server.openai_format import Json
from specplug.server.request_schema import ChatRequest, CommonRequest, CompletionRequest

LLAMA_SERVER_DEFAULTS: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "penalty_last_n": 64}
"""Defaults of llama-server that differ from those of OpenAI's API."""

NEVER_ENDS = 2**31 - 1
"""Least number of tokens of an answer that goes on until its limit."""


def chat_sampling(body: ChatRequest, lark: str | None = None) -> Sampling:
    """lark  the grammar of the calls of the request's tools, if it has any"""
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = _sampling(body, logprobs=logprobs)
    return sampling if lark is None else replace(sampling, lark=lark)


def completion_sampling(body: CompletionRequest) -> Sampling:
    sampling = _sampling(body, logprobs=body.logprobs)
    return replace(sampling, prompt_logprobs=body.logprobs) if body.echo else sampling


def llama_server_sampling(body: LlamaServerRequest) -> Sampling:
    """As llama-server samples, whose defaults differ from OpenAI's."""
    unset = LLAMA_SERVER_DEFAULTS.keys() - body.model_fields_set
    defaults = {name: value for name, value in LLAMA_SERVER_DEFAULTS.items() if name in unset}
    return replace(_sampling(body, logprobs=body.n_probs or None), **defaults)


def _sampling(body: CommonRequest, *, logprobs: int | None) -> Sampling:
    """Defaults are OpenAI's; those of fields that OpenAI's API does not have are llama.cpp's."""
    default = Sampling()
    schema, strict = _schema(body)
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=default.top_k if body.top_k is None else body.top_k,
        min_p=default.min_p if body.min_p is None else body.min_p,
        typical_p=default.typical_p if body.typical_p is None else body.typical_p,
        seed=None if body.seed is None else body.seed % (2**32 - 1),
        repeat_penalty=body.repeat_penalty or 1.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        penalty_last_n=-1 if body.penalty_last_n is None else body.penalty_last_n,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        grammar=body.grammar,
        json_schema=schema,
        regex=body.regex if body.choice is None else _one_of(body.choice),
        lark=None if body.lark is None else prepared_lark(body.lark),
        strict=strict,
        logprobs=logprobs,
        stop_tokens=frozenset(body.stop_token_ids),
        min_tokens=NEVER_ENDS if body.ignore_eos else body.min_tokens,
    )


def _one_of(texts: Sequence[str]) -> str:
    """A regular expression of some texts. Raises UsageError, in terms of the field, where they cannot be enforced."""
    if not any(texts):
        raise UsageError("choice (guided_choice) allows no text")
    regex = "|".join(map(re.escape, texts))
    try:
        grammar_text(Sampling(regex=regex))
    except UsageError as error:
        raise UsageError(str(error).replace("the regular expression", "choice (guided_choice)")) from error
    return regex


def _schema(body: CommonRequest) -> tuple[str | None, bool]:
    """The text of the JSON schema that the answer must match, and whether what cannot be enforced is refused."""
    if body.json_schema is not None:
        return body.json_schema if isinstance(body.json_schema, str) else json.dumps(body.json_schema), False
    if not body.is_shaped:
        return None, False
    assert body.response_format is not None
    wanted = body.response_format.json_schema
    schema: Json | bool = {"type": "object"} if wanted is None or wanted.schema_ is None else wanted.schema_
    return json.dumps(schema), wanted is not None and bool(wanted.strict)
