"""A least length of an answer: the tokens that would end it are not allowed before.

This module depends on the contract of constraints, not on how others work.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from copy import copy

import numpy as np

from specplug.core import IntArray, int_array
from specplug.engines.llama_cpp.context import Logits


class LeastLength:
    """A constraint on the first tokens of an answer."""

    warnings: Sequence[str] = ()

    def __init__(self, end_tokens: Set[int], tokens: int) -> None:
        """`tokens` must be emitted before one of `end_tokens` may be."""
        self._ends = int_array(sorted(end_tokens))
        self._left = tokens

    def best(self, logits: Logits) -> int | None:
        best = int(logits.argmax())
        if self._left <= 0 or best not in self._ends:
            return best
        rest = logits.copy()
        rest[self._ends] = -np.inf
        best = int(rest.argmax())
        return best if np.isfinite(rest[best]) else None

    def rows(self, logits: Logits, ids: IntArray | None) -> IntArray:
        every = np.arange(len(logits), dtype=np.int32)
        return every if self._left <= 0 else every[~np.isin(every if ids is None else ids, self._ends)]

    def accept(self, token: int) -> None:
        self._left -= 1

    def copy(self) -> LeastLength:
        return copy(self)

    def token_constraint(self) -> None:
        return None

    def close(self) -> None:
        pass
