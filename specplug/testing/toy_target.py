"""A target without a model: a language whose next token depends on the last few, the same in every process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray, int_array


class ToyTarget:
    """A tiny deterministic language model: its logits are a function of the last `order` tokens.

    Each token has `branches` plausible successors, which the seed fixes; the tokens before it decide their order. So
    the text repeats its bigrams, branches after them, and is determined by `order` tokens of context: proposers of
    every kind find something to draft.
    """

    def __init__(self, vocab: int = 64, seed: int = 0, *, order: int = 3, branches: int = 3) -> None:
        assert vocab > branches >= 1 and order >= 1
        self.vocab = vocab
        self.seed = seed
        self.order = order
        self.branches = branches

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32[vocab]: logits of the token after `tokens`: noise in [0, 1), plausible successors at 4 or more."""
        last = int(tokens[-1]) if len(tokens) else -1
        ids = np.arange(self.vocab, dtype=np.uint64)
        logits = (_mix(ids + np.uint64(_hash(self.seed, last))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        shift = _hash(self.seed, *(int(token) for token in tokens[-self.order :]))
        for rank, token in enumerate(self._successors(last)):
            logits[token] = 4.0 + 2.0 * ((rank + shift) % self.branches)
        return logits.astype(np.float32)

    def topk(self, tokens: Sequence[int], k: int) -> IntArray:
        """int32[k]: the most likely next ids, most likely first; of equally likely ones the lower id first."""
        return int_array(np.argsort(-self.logits(tokens), kind="stable")[:k].astype(np.int32))

    def greedy(self, prompt: Sequence[int], n: int) -> list[int]:
        """The n tokens that plain greedy decoding emits after `prompt`."""
        tokens = [int(token) for token in prompt]
        for _ in range(n):
            tokens.append(int(np.argmax(self.logits(tokens))))
        return tokens[len(tokens) - n :]

    def prompt(self, n: int, key: int = 0) -> IntArray:
        """int32[n]: a prompt of n tokens, which depends on the seed and `key` alone."""
        return int_array([_hash(self.seed, -2, key, i) % self.vocab for i in range(n)])

    def _successors(self, last: int) -> list[int]:
        start = _hash(self.seed, last, -3)
        stride = 1 + _hash(self.seed, last, -4) % ((self.vocab - 1) // self.branches)
        return [(start + j * stride) % self.vocab for j in range(self.branches)]


_MASK = (1 << 64) - 1


def _hash(*values: int) -> int:
    """A 64-bit hash that is the same in every process: the finaliser of SplitMix64, chained."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 for an array of 64-bit integers, which wrap around."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
