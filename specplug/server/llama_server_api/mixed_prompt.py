"""Prompts of token ids and texts in any order, as llama-server takes them."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.core import IntArray, int_array
from specplug.server.engine_protocol import Engine
from specplug.server.token_ids import checked_ids


def mixed_prompt(engine: Engine, prompt: str | Sequence[int | str]) -> IntArray:
    """int32[n]; the tokens that the model expects at the beginning of a text are added where it begins with a text."""
    if isinstance(prompt, str):
        return engine.raw_prompt(prompt)
    tokens: list[int] = []
    for index, part in enumerate(prompt):
        if isinstance(part, int):
            tokens.append(part)
        elif index == 0:
            tokens += engine.raw_prompt(part).tolist()
        else:
            tokens += engine.tokenize(part, add_special=False, parse_special=True).tolist()
    return checked_ids(tokens, engine.num_tokens) if tokens else int_array([])
