"""Explains the first difference between two greedy answers of vLLM: numerical rounding, or an error.

The text up to the difference is processed again by plain decoding in passes of several shapes. The log probabilities of
the two tokens move relative to each other over these shapes, and only the shape causes that. The difference is rounding
if the two lie closer together than this movement. How a text was drafted does not matter here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specplug.core import IntArray, int_array
from specplug.engines.vllm.offline import Vllm
from specplug.generation.answers import Answer, Request, Sampling
from specplug.verification.mismatch import Mismatch, first_difference

TOP = 20
"""Alternatives per token; vLLM's own limit."""

DECODED = (0, 1, 2, 4, 8, 16)
"""For each shape, the number of tokens before the difference that are decoded one by one; the tokens before them are
processed as a prompt."""


def explain(plain: Vllm, prompt: IntArray, plain_answer: Sequence[int], other_answer: Sequence[int]) -> Mismatch | None:
    """The cause of the first difference between plain decoding's answer and another one; None if they are equal."""
    position = first_difference(plain_answer, other_answer)
    if position is None:
        return None
    ours = plain_answer[position] if position < len(plain_answer) else None
    theirs = other_answer[position] if position < len(other_answer) else None
    if ours is None or theirs is None:
        return Mismatch(position, ours, theirs, float("inf"), 0.0, False)
    gaps = []
    for num_decoded in DECODED:
        if num_decoded > position:
            break
        start = position - num_decoded
        gap = _gap(plain, prompt, plain_answer[:start], plain_answer[start:position], ours, theirs)
        if gap is not None:
            gaps.append(gap)
    if not gaps:
        return Mismatch(position, ours, theirs, float("inf"), 0.0, False)
    moved = max(gaps) - min(gaps)
    gap = min(gaps, key=abs)
    return Mismatch(position, ours, theirs, gap, moved, min(gaps) <= 0.0 <= max(gaps) or abs(gap) <= moved)


def _gap(
    plain: Vllm, prompt: IntArray, prefilled: Sequence[int], decoded: Sequence[int], ours: int, theirs: int
) -> float | None:
    """The log probability of `ours` minus that of `theirs`, after `prefilled` as prompt and `decoded` one by one.

    None if plain decoding does not repeat `decoded`, or does not report both tokens.
    """
    text = int_array(np.concatenate([prompt, int_array(prefilled)])) if len(prefilled) else prompt
    answer = Answer()
    for _ in plain.stream(Request(text, len(decoded) + 1, Sampling(logprobs=TOP)), answer):
        pass
    if answer.tokens[: len(decoded)] != list(decoded) or len(answer.logprobs) <= len(decoded):
        return None
    logprobs = dict(answer.logprobs[len(decoded)].top)
    return logprobs[ours] - logprobs[theirs] if ours in logprobs and theirs in logprobs else None
