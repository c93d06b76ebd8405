"""Explains why two texts differ: because of rounding, or because of an error.

Evaluates passes of different shapes, which round differently. Does not depend on how a text was drafted.
The rule: the text up to the first difference is evaluated again, without drafts, in passes of many shapes. The
largest change of each logit over these shapes is what the shape of a pass can change there. The difference is rounding
if changes no larger than that can make the sampler, in the state that it had there, pick the other token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context, Logits, open_context
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.generation.answers import Sampling
from specplug.profile import Runtime
from specplug.verification.mismatch import Mismatch, first_difference

SHAPES = (2, 3, 4, 6, 8, 12, 16, 24)
"""Rows per pass with which a text is evaluated again."""

MIXTURES = 6
"""How many times a text is evaluated again in passes of random sizes, as a planner would choose them."""

DRAWS = 256
"""How many random perturbations are tried, each logit within its own bound."""


def explain(
    model: Model,
    runtime: Runtime,
    prompt: IntArray,
    plain: Sequence[int],
    other: Sequence[int],
    sampling: Sampling,
    *,
    padded: bool,
    shared_cache: bool,
) -> Mismatch | None:
    """The first difference between the plain and another answer to `prompt`, with its cause; None if they are equal.

    padded        whether plain decoding added a second row to its passes, as `exact` does where that is necessary
    shared_cache  whether other sequences were in the same cache
    """
    position = first_difference(plain, other)
    if position is None:
        return None
    if position >= min(len(plain), len(other)):
        longer = plain if len(plain) > len(other) else other
        a = longer[position] if longer is plain else None
        b = longer[position] if longer is other else None
        return Mismatch(position, a, b, np.inf, 0.0, False)
    a, b = plain[position], other[position]
    known = np.asarray(plain[:position], dtype=np.int32)
    cells = -(-(len(prompt) + 3 * position + 64) // 256) * 256
    sampler = Sampler(model, sampling, coupled=runtime.coupled)
    try:
        with open_context(model, runtime, cells=cells, num_ids=4, max_rows=SHAPES[-1] + 2) as context:
            base = _plain_logits(context, prompt, known, sampler, padded)
            bound, pair, reachable = np.zeros_like(base), 0.0, False
            for line in _shapes(context, prompt, known, shared_cache):
                bound = np.maximum(bound, np.abs(line - base))
                pair = max(pair, abs(float((line[a] - line[b]) - (base[a] - base[b]))))
                reachable = any(sampler.pick_from(seen) == b for seen in (line, _worst_case(base, bound, a, b)))
                if reachable:
                    break
        if not reachable:
            draws = np.random.default_rng(0)
            reachable = any(
                sampler.pick_from(base + bound * draws.uniform(-1, 1, len(base)).astype(np.float32)) == b
                for _ in range(DRAWS)
            )
    finally:
        sampler.close()
    return Mismatch(position, a, b, float(base[a] - base[b]), pair, reachable)


def _shapes(context: Context, prompt: IntArray, known: IntArray, shared_cache: bool) -> Iterator[Logits]:
    """float32[V] per shape: the logits after the same text, evaluated in passes of that shape."""
    for rows in SHAPES:
        yield _in_passes(context, prompt, known, cycle([rows]))
    for mixture in range(MIXTURES):
        sizes = np.random.default_rng(mixture).choice((1, 1, 2, 3, 5, 8), len(known) + 1).tolist()
        yield _in_passes(context, prompt, known, iter(sizes))
    if shared_cache:
        yield _interleaved(context, prompt, known)
    if context.model.has_recurrent_memory:  # whose prompt may have been read in any pieces, up to a checkpoint and on
        for mixture in range(MIXTURES):
            random = np.random.default_rng(mixture)
            first = int(random.integers(1, len(prompt) + 1))
            rest = np.append(prompt[first:], known)
            yield _in_passes(context, prompt[:first], rest, iter(random.choice(SHAPES, len(rest) + 1).tolist()))


def _worst_case(base: Logits, bound: Logits, a: int, b: int) -> Logits:
    """The logits most favourable to token b over token a within the bounds."""
    logits = base.copy()
    logits[a] -= bound[a]
    logits[b] += bound[b]
    return logits


def _plain_logits(context: Context, prompt: IntArray, known: IntArray, sampler: Sampler, padded: bool) -> Logits:
    """float32[V]: the logits after the prompt and `known`, one token per pass as in plain decoding; a copy.

    The sampler picks each of these tokens again, so that it ends in the state that it had in plain decoding.
    """
    logits = context.read(prompt)
    _follow(sampler, context, logits, known, 0)
    for at, token in enumerate(known.tolist()):
        context.clear_batch()
        context.add(token, len(prompt) + at, [0])
        if padded:
            context.drop(1)
            context.add(token, 0, [1])
        context.decode()
        logits = context.logits(context.rows)
        _follow(sampler, context, logits, known, at + 1)
    return np.array(logits[0])


def _in_passes(context: Context, prompt: IntArray, known: IntArray, sizes: Iterator[int]) -> Logits:
    """float32[V]: the logits after the prompt and `known`, the latter read in passes of these sizes; a copy."""
    logits = context.read(prompt)
    at = 0
    while at < len(known):
        part = known[at : at + next(sizes)]
        context.clear_batch()
        context.add_span(part, len(prompt) + at, 0, wanted=True)
        context.decode()
        logits = context.logits(len(part))
        at += len(part)
    return np.array(logits[-1])


def _follow(sampler: Sampler, context: Context, logits: Logits, known: IntArray, index: int) -> None:
    """Let the sampler pick known[index] again, if there is one."""
    if index < len(known):
        sampler.pick(context, logits, 0)


def _interleaved(context: Context, prompt: IntArray, known: IntArray) -> Logits:
    """float32[V]: as `_in_passes`, one token a pass, beside a second sequence with cells in between; a copy."""
    logits = context.read(prompt)
    context.copy(0, 1)
    for at, token in enumerate(known.tolist()):
        context.clear_batch()
        for seq in (1, 0):
            context.add(token, len(prompt) + at, [seq])
        context.decode()
        logits = context.logits(2)
    return np.array(logits[-1])
