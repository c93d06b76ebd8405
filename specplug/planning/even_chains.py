"""Chooses one length for the chains of all sequences of a pass, as a recurrent state requires.

Such a pass has as many rows for every sequence. Where the state cannot be taken back by itself, the rows that were
right are evaluated once more after a rejection, which is part of what a draft costs. It depends on path probabilities
and costs only.
Source: for the rows, llama.cpp splits a batch whose sequences have unequal numbers of rows (src/llama-batch.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from specplug.core import Step
from specplug.planning.constants import MIN_SPEEDUP

Paths = Sequence[Sequence[float]]
"""The path probabilities of each sequence's chain."""


@dataclass(frozen=True, slots=True)
class EvenChoice:
    """A common length, and what is expected of it.

    length     draft tokens of every sequence; shorter chains are filled up
    rows       of the pass
    tokens     accepted draft tokens plus one token of the target's own per sequence
    pass_ms    time of the pass
    reread_ms  time in which rows are evaluated once more
    """

    length: int
    rows: int
    tokens: float
    pass_ms: float
    reread_ms: float = 0.0


def best_length(
    paths: Paths, ms: Sequence[float], max_nodes: int, *, rereads: bool, static: bool = False
) -> EvenChoice:
    """The length with the most expected tokens per millisecond; 0 where none is faster than plain decoding.

    ms         costs of 1, 2, ... rows
    max_nodes  most draft rows of a pass, those that fill chains up included
    rereads    see `DraftLimits`
    static     take the longest
    """
    n = len(paths)
    chosen = EvenChoice(0, n, float(n), ms[min(n, len(ms)) - 1])
    longest = min(max(map(len, paths), default=0), max_nodes // n, len(ms) // n - 1)
    rate, tokens, reread_ms = MIN_SPEEDUP * chosen.tokens / chosen.pass_ms, chosen.tokens, 0.0
    reached = [1.0] * n
    for length in range(1, longest + 1):
        path = [path[length - 1] if length <= len(path) else 0.0 for path in paths]
        tokens += sum(path)
        if rereads:
            reread_ms += (sum(reached) - sum(path)) * ms[length - 1]
        reached = path
        pass_ms = ms[n * (1 + length) - 1]
        if static or tokens / (pass_ms + reread_ms) > rate:
            rate = tokens / (pass_ms + reread_ms)
            chosen = EvenChoice(length, n * (1 + length), tokens, pass_ms, reread_ms)
    return chosen


def reread_ms(steps: Sequence[Step], ms: Sequence[float]) -> float:
    """Milliseconds in which rows of a pass are evaluated once more, where `DraftLimits.rereads` holds.

    The chains of all sequences were filled up to the longest one; with a token more than that, nothing was rejected.
    """
    longest = max((len(step.draft) for step in steps), default=0)
    return sum(ms[len(step.accepted)] for step in steps if len(step.accepted) < longest)


def reread_costs(path: Sequence[float], ms: Sequence[float]) -> Iterator[float]:
    """Expected milliseconds in which rows are evaluated once more, for the first 1, 2, ... nodes of a chain.

    After `accepted` nodes of a longer chain these are `accepted + 1` rows.
    """
    cost, reached = 0.0, 1.0
    for accepted, p in enumerate(path):
        cost += (reached - p) * ms[min(accepted, len(ms) - 1)]
        reached = p
        yield cost
