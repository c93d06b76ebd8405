"""The part of a proposer that only names a drafter: the engine replaces it by a drafter of its own.

This module depends on the contract of a proposer alone.
"""

from __future__ import annotations

from specplug.core import EMPTY, Bucket, Draft, IntArray, Step


class NamedDrafter:
    """Base of proposers that name a drafter and its options. Without buckets they are never asked to draft."""

    buckets: tuple[Bucket, ...] = ()

    def begin(self, seq: int, prompt: IntArray) -> None:
        pass

    def propose(self, seq: int, budget: int) -> Draft:
        return EMPTY

    def observe(self, seq: int, step: Step) -> None:
        pass

    def end(self, seq: int) -> None:
        pass
