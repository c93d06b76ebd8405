"""What a model-based proposer would draft at every place of a known text, recorded so that a replay needs no model."""

from __future__ import annotations

from dataclasses import dataclass

from specplug.core import FloatArray, IntArray, Likeliest


@dataclass(frozen=True, slots=True, eq=False)
class Guesses:
    """One draft token per place, given the right tokens before it.

    tokens         int32[n]
    buckets        int32[n]       their buckets
    top            int32[n, k]    the likeliest tokens at each place, likeliest first; None where they are not recorded
    probabilities  float64[n, k]  their probabilities
    """

    tokens: IntArray
    buckets: IntArray
    top: IntArray | None = None
    probabilities: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def at(self, place: int, count: int, top: int) -> list[Likeliest]:
        """The `top` likeliest tokens at so many places from `place` on; empty where they are not recorded."""
        if self.top is None or self.probabilities is None:
            return []
        places = range(place, min(place + count, len(self)))
        return [Likeliest(self.top[at, :top], self.probabilities[at, :top]) for at in places]
