"""Says what to do where a text is longer than the context. Opens no model."""

from __future__ import annotations

ROOM = 256
"""Tokens for an answer that a recommended context has beyond the text, at least, where the model allows it."""


def context_advice(tokens: int, trained: int = 0) -> str:
    """For example `raise it with --context 8192`: a context for `tokens` tokens and an answer, or why there is none.

    trained  tokens that the model was trained for; 0 where that is unknown
    """
    if trained and tokens >= trained:
        return f"the model was trained for {trained}, so shorten the prompt"
    ample = 1 << (tokens + ROOM - 1).bit_length()
    return f"raise it with --context {min(ample, trained) if trained else ample}"
