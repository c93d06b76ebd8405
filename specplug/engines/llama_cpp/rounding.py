"""Why two texts differ: rounding, or something that must not happen.

Knows how passes of different shapes round differently. Knows nothing of how a text was drafted.
The rule: evaluate the text up to the first difference again, with nothing drafted, in passes of many shapes. The
largest change of each logit over these shapes is what shape alone can do here. It is rounding if the sampler, in
the state it had there, can be brought from the one token to the other by changes no larger than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context, Logits, open_context
from specplug.engines.llama_cpp.engine import resolved
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.sampling import Sampler, Sampling
from specplug.profile import Profile

SHAPES = (2, 3, 4, 6, 8, 12, 16, 24)
"""Rows per pass that a text is evaluated in again."""

DRAWS = 256
"""Random perturbations tried where tokens are sampled, each logit within its own bound."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first difference of two token lists.

    position         index into the answers
    gap              plain logit of the plain token minus that of the other, after one-row passes
    shape_difference how far pass shapes alone moved these two logits apart, at most
    is_rounding      whether shape alone explains it
    """

    position: int
    plain_token: int | None
    other_token: int | None
    gap: float
    shape_difference: float
    is_rounding: bool


def first_difference(plain: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, or None; a missing token differs."""
    for position, (a, b) in enumerate(zip(plain, other, strict=False)):
        if a != b:
            return position
    return None if len(plain) == len(other) else min(len(plain), len(other))


def explain(
    model: Model,
    profile: Profile,
    prompt: IntArray,
    plain: Sequence[int],
    other: Sequence[int],
    sampling: Sampling,
) -> Mismatch | None:
    """What the first difference between the plain and another answer to `prompt` comes from; None if there is none."""
    position = first_difference(plain, other)
    if position is None:
        return None
    if position >= min(len(plain), len(other)):
        longer = plain if len(plain) > len(other) else other
        a = longer[position] if longer is plain else None
        b = longer[position] if longer is other else None
        return Mismatch(position, a, b, np.inf, 0.0, False)
    a, b = plain[position], other[position]
    runtime = resolved(profile).runtime
    known = np.asarray(plain[:position], dtype=np.int32)
    cells = -(-(len(prompt) + 3 * position + 64) // 256) * 256
    sampler = Sampler(model, sampling)
    try:
        with open_context(model, runtime, cells=cells, num_ids=4, max_rows=SHAPES[-1] + 2) as context:
            first = 2 if profile.exact else 1
            base = _by_rows(context, prompt, known, first, sampler)
            others = [_by_rows(context, prompt, known, n, None) for n in SHAPES if n != first]
            others.append(_scattered(context, prompt, known))
        bound = np.max([np.abs(line - base) for line in others], axis=0)
        pair = max(abs(float((line[a] - line[b]) - (base[a] - base[b]))) for line in others)
        reachable = any(sampler.pick_from(line) == b for line in _perturbed(base, bound, others, a, b))
    finally:
        sampler.close()
    return Mismatch(position, a, b, float(base[a] - base[b]), pair, reachable)


def _perturbed(base: Logits, bound: Logits, others: Sequence[Logits], a: int, b: int) -> Iterator[Logits]:
    """Logits that shape alone could have given: those seen, the worst case for this pair, random ones in bounds."""
    yield from others
    directed = base.copy()
    directed[a] -= bound[a]
    directed[b] += bound[b]
    yield directed
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        yield base + bound * rng.uniform(-1, 1, len(base)).astype(np.float32)


def _by_rows(context: Context, prompt: IntArray, known: IntArray, rows: int, sampler: Sampler | None) -> Logits:
    """float32[V] after the prompt and `known`, the latter in passes of `rows` tokens; a copy.

    A sampler picks on the way at every token, as it did in plain decoding; only possible with one token a pass.
    """
    logits = _read(context, prompt)
    if sampler is not None:
        _follow(sampler, context, logits, known, 0)
    step = 1 if sampler is not None else rows
    position = len(prompt)
    for at in range(0, len(known), step):
        part = known[at : at + step]
        context.clear_batch()
        context.add_span(part, position, 0, wanted=True)
        if rows == 2 and step == 1:
            context.drop(1)
            context.add(int(part[0]), 0, [1])
        context.decode()
        logits = context.logits(context.rows)[: len(part)]
        position += len(part)
        if sampler is not None:
            _follow(sampler, context, context.logits(context.rows), known, at + 1)
    return np.array(logits[-1])


def _follow(sampler: Sampler, context: Context, logits: Logits, known: IntArray, index: int) -> None:
    """Let the sampler pick known[index] again, so that its state is that of plain decoding."""
    if index < len(known):
        sampler.pick(context, logits, 0)


def _scattered(context: Context, prompt: IntArray, known: IntArray) -> Logits:
    """float32[V] as `_by_rows`, in passes of two tokens with a rejected sibling between: later cells fill the holes."""
    logits = _read(context, prompt)
    position = len(prompt)
    for at in range(0, len(known) - 1, 2):
        context.clear_batch()
        context.add(int(known[at]), position, [0, 2])
        context.add(int(known[at]), position + 1, [2])
        context.add(int(known[at + 1]), position + 1, [0])
        context.copy(0, 2)
        context.decode()
        logits = context.logits(3)
        context.drop(2)
        position += 2
    if len(known) % 2:
        context.clear_batch()
        context.add_span(known[-1:], position, 0, wanted=True)
        context.decode()
        logits = context.logits(1)
    return np.array(logits[-1])


def _read(context: Context, prompt: IntArray) -> Logits:
    context.clear()
    for at in range(0, len(prompt), context.num_batch):
        part = prompt[at : at + context.num_batch]
        context.clear_batch()
        context.add_span(part, at, 0, wanted=False, last=True)
        context.decode()
    return context.logits(1)
