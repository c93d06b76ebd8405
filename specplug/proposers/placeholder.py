"""What a proposer does that an engine replaces by something of its own: nothing.

Knows the contract. Knows neither names nor engines.
"""

from __future__ import annotations

from specplug.core import EMPTY, Bucket, Draft, IntArray, Step


class Named:
    """Half of a class that names a drafter and its options; it has no buckets, so that nobody asks it to draft."""

    buckets: tuple[Bucket, ...] = ()

    def begin(self, seq: int, prompt: IntArray) -> None:
        pass

    def propose(self, seq: int, budget: int) -> Draft:
        return EMPTY

    def observe(self, seq: int, step: Step) -> None:
        pass

    def end(self, seq: int) -> None:
        pass
