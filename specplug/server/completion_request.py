"""What a request for a text completion asks for: its prompts, and how its answers are sampled.

This module depends on no engine but through `Engine`, and not on how a response looks.
"""

from __future__ import annotations

from specplug.core import IntArray
from specplug.server.answering import Work
from specplug.server.engine_protocol import Engine
from specplug.server.filling_in import completion_to_fill
from specplug.server.openai_format import CompletionFormat
from specplug.server.request_schema import CompletionRequest
from specplug.server.sampling_options import completion_sampling
from specplug.server.state import State
from specplug.server.token_ids import checked_ids


def read_completion(state: State, body: CompletionRequest) -> tuple[Work, CompletionFormat]:
    """Call it in a thread, since it tokenizes. Raises UsageError for ids outside of the vocabulary, and for a suffix
    where the model has no tokens for fill-in-the-middle."""
    engine = state.engine
    if body.suffix is None:
        prompts = [_prompt(engine, prompt, parse_special=body.special) for prompt in body.prompts]
    else:
        prompts = [completion_to_fill(state, prompt, body.suffix) for prompt in body.prompts]
    work = Work(prompts, completion_sampling(body), body.limit, body.stops, bool(body.echo))
    scored = body.logprobs is not None
    return work, CompletionFormat(state.settings.name, engine.piece, engine.end_tokens, engine.knows_plain_ms, scored)


def _prompt(engine: Engine, prompt: str | list[int], *, parse_special: bool) -> IntArray:
    if isinstance(prompt, str):
        return engine.raw_prompt(prompt, parse_special=parse_special)
    return checked_ids(prompt, engine.num_tokens)
