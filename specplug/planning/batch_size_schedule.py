"""Chooses the number of draft tokens by batch size, where an engine verifies the same number for every sequence.

It depends on measured times and on how many tokens drafts are expected to give, not on an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, takewhile
from math import ceil, sqrt

from specplug.planning.constants import MIN_SPEEDUP
from specplug.profile import CostPoints

EXPECTED_TOKENS: Mapping[tuple[str, ...], Sequence[float]] = {
    ("suffix", "token_recycling"): (1.0, 1.42, 1.62, 1.74, 1.81, 1.86, 1.90, 1.93, 1.94),
    ("suffix",): (1.0, 1.41, 1.60, 1.71, 1.78, 1.83, 1.86, 1.89, 1.91),
    (): (1.0, 1.26, 1.34, 1.37, 1.38, 1.38, 1.39, 1.39, 1.39),  # token recycling, the lowest
}
"""By proposers, the tokens per step and sequence with 0, 1, 2 ... draft tokens, where nothing is known about the user's
work; () stands for all others, and further proposers add nothing. Measured on the built-in workload with
benchmarks/v2_acceptance.py on SmolLM2-135M, where fewer are accepted than on Qwen2.5-Coder-0.5B.
"""

Range = tuple[int, int, int]
"""(first, last, draft tokens per sequence)"""

MOST_SEQUENCES = 1024
"""Batch sizes are covered up to this one where a profile does not limit them."""


def expected_tokens(methods: Sequence[str], most: int) -> list[float]:
    """Tokens per step and sequence with 0 to `most` draft tokens of these proposers."""
    known = max((line for named, line in EXPECTED_TOKENS.items() if {*named} <= {*methods}), key=sum)
    return [known[min(length, len(known) - 1)] for length in range(most + 1)]


def best_length(tokens: Sequence[float], ms: Sequence[float]) -> int:
    """The number of draft tokens per sequence that gives the most tokens per millisecond.

    tokens  per step and sequence, by draft tokens from 0 on
    ms      of a step, by draft tokens; the first is that of an engine that does not speculate
    Returns 0 where none is MIN_SPEEDUP times as fast as not speculating.
    """
    rates = [count / cost for count, cost in zip(tokens, ms, strict=False)]
    best = max(range(len(rates)), key=rates.__getitem__)
    return best if rates[best] > MIN_SPEEDUP * rates[0] else 0


def ranges_of(lengths: Mapping[int, int], most: int) -> tuple[Range, ...]:
    """Ranges of batch sizes from 1 to `most`, for the lengths chosen at some of them.

    A size in between has the length of the measured size that is nearer by ratio; beyond the largest one nothing is
    drafted, because more sequences leave less time for draft tokens.
    """
    sizes = sorted(lengths)
    ends = [ceil(sqrt(size * larger)) - 1 for size, larger in pairwise(sizes)] + sizes[-1:]
    ranges: list[Range] = []
    for size, end in [*zip(sizes, ends, strict=True), (None, most)]:
        first = ranges[-1][1] + 1 if ranges else 1
        last, tokens = min(most, max(size or 0, end)), lengths[size] if size else 0
        if first > last:
            continue
        if ranges and ranges[-1][2] == tokens:
            first = ranges.pop()[0]
        ranges.append((first, last, tokens))
    return tuple(ranges)


def lengths_of(curves: Iterable[CostPoints], tokens: Sequence[float]) -> dict[int, int]:
    """Draft tokens by number of sequences, at the longest context that was timed; 0 where none of them pays.

    curves  of an engine that does not speculate at one row per sequence, and of one that verifies the same number of
            draft tokens for every sequence at multiples of that
    tokens  expected per step and sequence, by draft tokens from 0 on
    """
    lengths = {}
    for curve in curves:
        ms_of = dict(zip(curve.rows, curve.ms[-1], strict=True))
        timed = takewhile(ms_of.__contains__, (curve.sequences * (1 + n) for n in range(len(tokens))))
        lengths[curve.sequences] = best_length(tokens, [ms_of[rows] for rows in timed])
    return lengths


def length_at(ranges: Iterable[Range], sequences: int) -> int:
    """Draft tokens per sequence while `sequences` run; beyond the last range its number, as in vLLM."""
    found = 0
    for first, _, length in ranges:
        if first <= sequences:
            found = length
    return found


def in_words(ranges: Iterable[Range]) -> str:
    """For example `6 for 1, 4 for 2 to 8, 0 for 9 to 1024`."""
    sizes = ((length, f"{first} to {last}" if first < last else f"{first}") for first, last, length in ranges)
    return ", ".join(f"{length} for {size}" for length, size in sizes)
