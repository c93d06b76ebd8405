"""How a request wants its tokens drawn.

Knows OpenAI's fields, llama.cpp's beside them, and the defaults of both. Knows no engine.
"""

from __future__ import annotations

import json

from specplug.generation.answers import Sampling
from specplug.server.request_schema import ChatRequest, Common, CompletionRequest
from specplug.server.shapes import Json
from specplug.server.tools import forced_schema


def chat_sampling(asked: ChatRequest) -> Sampling:
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    schema: Json | None = forced_schema(asked)
    if asked.response_format is not None and asked.response_format.type != "text":
        wanted = asked.response_format.json_schema
        schema = wanted.schema_ if wanted is not None and wanted.schema_ else {"type": "object"}
    return _sampling(asked, logprobs=logprobs, json_schema=None if schema is None else json.dumps(schema))


def completion_sampling(asked: CompletionRequest) -> Sampling:
    return _sampling(asked, logprobs=asked.logprobs)


def _sampling(asked: Common, *, logprobs: int | None, json_schema: str | None = None) -> Sampling:
    """OpenAI's defaults; top_k and min_p, which its API does not have, are llama.cpp's."""
    default = Sampling()
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=default.top_k if asked.top_k is None else asked.top_k,
        min_p=default.min_p if asked.min_p is None else asked.min_p,
        seed=None if asked.seed is None else asked.seed % (2**32 - 1),
        repeat_penalty=asked.repeat_penalty or 1.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (asked.logit_bias or {}).items()},
        grammar=asked.grammar,
        json_schema=json_schema,
        logprobs=logprobs,
    )
