"""Prompts for fill-in-the-middle out of requests: texts become tokens, and a model without the marks is refused.

This module depends on no engine but through `Engine`. The form of prompts is that of generation/fill_in.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.generation.fill_in import FillInTokens, OtherFile, fitted, in_order, other_files
from specplug.server.state import State
from specplug.server.token_ids import checked_ids

MOST_FREE = 4
"""One part of this many of the context is kept free for the answer at most, however long it may become."""


def completion_to_fill(state: State, prefix: str | Sequence[int], suffix: str) -> IntArray:
    """int32[n]: the prompt for a text completion with a suffix. UsageError for a model without the marks."""
    marks = _marks(state)
    before = _tokens(state, prefix) if isinstance(prefix, str) else checked_ids(prefix, state.engine.num_tokens)
    return in_order(marks, before, _tokens(state, suffix), suffix_first=state.settings.suffix_first)


def infill_prompt(
    state: State, prefix: str, suffix: str, prompt: str, files: Sequence[OtherFile], max_tokens: int | None
) -> IntArray:
    """int32[n]: the prompt for /infill, cut to what fits. UsageError for a model without the marks."""
    marks = _marks(state)
    engine = state.engine
    typed = engine.tokenize(prompt, add_special=False, parse_special=True)
    extra = other_files(marks, files, lambda text: _tokens(state, text))
    context = engine.max_context
    answer = context // MOST_FREE if max_tokens is None else min(max_tokens, context // MOST_FREE)
    parts = _tokens(state, prefix), typed, _tokens(state, suffix), extra
    before, after, others = fitted(*parts, context=context, answer=answer)
    return in_order(marks, before, after, suffix_first=state.settings.suffix_first, before=others)


def _marks(state: State) -> FillInTokens:
    marks = state.engine.fill_in_tokens
    if marks is None:
        raise UsageError(
            f"the model {state.settings.name} has no tokens for fill-in-the-middle; serve one that was trained for it, "
            "such as Qwen2.5-Coder"
        )
    return marks


def _tokens(state: State, text: str) -> IntArray:
    return state.engine.tokenize(text, add_special=False, parse_special=False)
