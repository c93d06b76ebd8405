"""Why two greedy texts of vLLM differ: rounding, or something that must not happen.

Knows plain decoding's engine. Knows nothing of how a text was drafted.
The rule: the text up to the first difference is read again, with nothing drafted, in passes of several shapes. What the
two tokens' log probabilities move apart over these shapes is what shape alone does here; it is rounding if they lie
closer together than that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specplug.core import IntArray, int_array
from specplug.engines.vllm.offline import Vllm
from specplug.generation.answers import Answer, Request, Sampling
from specplug.verification.mismatch import Mismatch, first_difference

TOP = 20
"""Alternatives that vLLM reports per token by its own limit."""

SHAPES = (0, 1, 2, 4, 8, 16)
"""So many tokens of the text are generated again one by one before the place, the others read as a prompt."""


def explain(plain: Vllm, prompt: IntArray, one: Sequence[int], other: Sequence[int]) -> Mismatch | None:
    """What the first difference between plain decoding's answer and another one comes from; None if there is none."""
    position = first_difference(one, other)
    if position is None:
        return None
    ours = one[position] if position < len(one) else None
    theirs = other[position] if position < len(other) else None
    if ours is None or theirs is None:
        return Mismatch(position, ours, theirs, float("inf"), 0.0, False)
    gaps = []
    for back in SHAPES:
        if back > position:
            break
        gap = _gap(plain, prompt, one[: position - back], one[position - back : position], ours, theirs)
        if gap is not None:
            gaps.append(gap)
    if not gaps:
        return Mismatch(position, ours, theirs, float("inf"), 0.0, False)
    moved = max(gaps) - min(gaps)
    gap = min(gaps, key=abs)
    return Mismatch(position, ours, theirs, gap, moved, min(gaps) <= 0.0 <= max(gaps) or abs(gap) <= moved)


def _gap(
    plain: Vllm, prompt: IntArray, read: Sequence[int], again: Sequence[int], ours: int, theirs: int
) -> float | None:
    """Log probability of the one token less that of the other, after `read` as a prompt and `again` one by one."""
    text = int_array(np.concatenate([prompt, int_array(read)])) if len(read) else prompt
    answer = Answer()
    for _ in plain.stream(Request(text, len(again) + 1, Sampling(logprobs=TOP)), answer):
        pass
    if answer.tokens[: len(again)] != list(again) or len(answer.logprobs) <= len(again):
        return None
    found = dict(answer.logprobs[len(again)].top)
    return found[ours] - found[theirs] if ours in found and theirs in found else None
