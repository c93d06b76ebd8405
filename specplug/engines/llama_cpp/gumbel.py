"""Random numbers for sampling that depend only on seed, place and token, so that two models can share them.

Works on token ids and logits, and does not depend on a model or on llama.cpp's samplers.
Source: the Gumbel-max trick, shared by drafter and target as in drafter-invariant speculative decoding
(arXiv 2408.07978). Each model takes the token with the largest sum of logit and noise. So each one samples from its own
distribution, and both sample the same token almost as often as rejection sampling accepts a draft token. The noise does
not depend on the draft, so the planner may look at draft tokens, and a seed gives the same text with every proposer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of splitmix64 (Steele, Lea, Flood 2014), which serves as a hash function."""


@dataclass(slots=True)
class GumbelNoise:
    """The noise of one sequence; `place` is the number of tokens sampled so far."""

    seed: int
    place: int = 0

    def draw(self, ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> int:
        """Sample from unnormalised logits (float32[n]) of the tokens `ids`: returns an index, and advances `place`."""
        drawn = int((logits + self.at(self.place, ids)).argmax())
        self.place += 1
        return drawn

    def at(self, place: int, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """float64[n]: standard Gumbel noise of the tokens `ids` at a place."""
        key = _splitmix(self.seed ^ _splitmix(place + 1))
        x = ids.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
        x ^= x >> np.uint64(31)
        uniform = ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # never 0 nor 1
        noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
        return noise


def _splitmix(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)
