"""Plain decoding: the proposer that never drafts.

It is the baseline and the fallback: plain decoding runs through the same code as every method. It keeps no tokens.
"""

from __future__ import annotations

from specplug.core import EMPTY, Bucket, Draft, IntArray, Requires, Step


class NoDraft:
    """Always returns the empty draft.

    State: the ids of the running sequences, to notice mistaken calls. Requires: nothing. Cost per step: below 1 us.
    """

    requires = Requires()
    buckets: tuple[Bucket, ...] = ()

    def __init__(self) -> None:
        self._running: set[int] = set()

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._running.add(seq)

    def propose(self, seq: int, budget: int) -> Draft:
        self._require(seq)
        return EMPTY

    def observe(self, seq: int, step: Step) -> None:
        self._require(seq)

    def end(self, seq: int) -> None:
        self._running.remove(seq)

    def _require(self, seq: int) -> None:
        if seq not in self._running:
            raise KeyError(seq)
