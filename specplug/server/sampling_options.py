"""Translate a request's sampling fields into `Sampling`, with OpenAI's and llama.cpp's defaults.

This module depends on no engine.
"""

from __future__ import annotations

import json

from specplug.generation.answers import Sampling
from specplug.server.openai_format import Json
from specplug.server.request_schema import ChatRequest, CommonRequest, CompletionRequest


def chat_sampling(body: ChatRequest, lark: str | None = None) -> Sampling:
    """lark  the grammar of the calls of the request's tools, if it has any"""
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    schema: Json | bool | None = None
    strict = False
    if body.response_format is not None and body.response_format.type != "text":
        wanted = body.response_format.json_schema
        schema = {"type": "object"} if wanted is None or wanted.schema_ is None else wanted.schema_
        strict = wanted is not None and bool(wanted.strict)
    text = None if schema is None else json.dumps(schema)
    return _sampling(body, logprobs=logprobs, json_schema=text, strict=strict, lark=lark)


def completion_sampling(body: CompletionRequest) -> Sampling:
    return _sampling(body, logprobs=body.logprobs)


def _sampling(
    body: CommonRequest,
    *,
    logprobs: int | None,
    json_schema: str | None = None,
    strict: bool = False,
    lark: str | None = None,
) -> Sampling:
    """Defaults are OpenAI's; those of top_k and min_p, which OpenAI's API does not have, are llama.cpp's."""
    default = Sampling()
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=default.top_k if body.top_k is None else body.top_k,
        min_p=default.min_p if body.min_p is None else body.min_p,
        seed=None if body.seed is None else body.seed % (2**32 - 1),
        repeat_penalty=body.repeat_penalty or 1.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        grammar=body.grammar,
        json_schema=json_schema,
        lark=lark,
        strict=strict,
        logprobs=logprobs,
    )
