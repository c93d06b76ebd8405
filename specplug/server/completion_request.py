"""What a request for a text completion asks for: its prompts, and how its answers are sampled.

This module depends on no engine but through `Engine`, and not on how a response looks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specplug.core import IntArray, int_array
from specplug.errors import UsageError
from specplug.server.answering import Work
from specplug.server.engine_protocol import Engine
from specplug.server.openai_format import CompletionFormat
from specplug.server.request_schema import CompletionRequest
from specplug.server.sampling_options import completion_sampling


def read_completion(engine: Engine, model: str, body: CompletionRequest) -> tuple[Work, CompletionFormat]:
    """Call it in a thread, since it tokenizes. Raises UsageError for ids outside of the vocabulary.

    model  the name in responses
    """
    prompts = [_prompt(engine, prompt, parse_special=body.special) for prompt in body.prompts]
    work = Work(prompts, completion_sampling(body), body.limit, body.stops, bool(body.echo))
    return work, CompletionFormat(model, engine.piece, engine.end_tokens, engine.knows_plain_ms)


def check_ids(tokens: Sequence[int], num_tokens: int) -> None:
    """Raise UsageError for an id outside of the vocabulary."""
    if len(tokens) and int(np.max(tokens)) >= num_tokens:
        raise UsageError(f"there is no token {int(np.max(tokens))}; the vocabulary has {num_tokens} tokens")


def _prompt(engine: Engine, prompt: str | list[int], *, parse_special: bool) -> IntArray:
    if isinstance(prompt, str):
        return engine.raw_prompt(prompt, parse_special=parse_special)
    check_ids(prompt, engine.num_tokens)
    return int_array(prompt)
