"""Assigns slots to sequences, and finds the slot whose cached tokens a new prompt can reuse."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specplug.core import IntArray
from specplug.engines.llama_cpp.cells import Cells
from specplug.engines.llama_cpp.state_cells import StateCells
from specplug.errors import UsageError

WORTH_WAITING = 64
"""A prompt that shares at least this many first tokens with one being read waits until that one is read."""


class Slots:
    """The slots of one context, numbered from 0; a slot's number is its sequence id."""

    def __init__(self, cells: Cells | StateCells, count: int, *, reuse: bool) -> None:
        """`reuse`: whether a prompt may use cached tokens; without it every prompt is read from its beginning."""
        self.free = list(range(count))
        """The slots without a sequence, the least recently used first."""
        self._cells = cells
        self._count = count
        self._reuse = reuse

    def take(self, prompt: IntArray, *, reuse: bool = True) -> tuple[int, int, list[int]]:
        """A free slot for a prompt (int32[n], n >= 1), how many of the prompt's tokens the slot now holds, and where
        checkpoints are to be made while the others are read.

        reuse  False where all tokens have to be read
        Raises UsageError where no slot is free.
        """
        if not self.free:
            raise UsageError("every slot is taken; finish a sequence first")
        cells = self._cells
        if not (self._reuse and reuse):
            seq = self.free.pop(0)
            cells.truncate(seq)
            return seq, 0, []
        # The last token is always evaluated anew, since its logits are needed.
        common = [min(common_prefix(cached, prompt), len(prompt) - 1) for cached in cells.tokens]
        usable = [
            cells.reusable(seq, length) if seq in self.free else cells.shareable(seq, length)
            for seq, length in enumerate(common)
        ]
        best = max(range(self._count), key=lambda seq: (usable[seq], seq in self.free))
        length = usable[best]
        if best in self.free and (2 * length >= len(cells.tokens[best]) or len(self.free) == 1):
            seq = best
            cells.truncate(seq, length)
        else:  # another sequence uses it, or most of it belongs to another conversation
            seq = next(seq for seq in self.free if seq != best)
            cells.truncate(seq)
            length = cells.shareable(best, common[best])
            if length:
                cells.share(best, seq, length)
        self.free.remove(seq)
        return seq, length, cells.places(prompt, length, max(common))

    def first_empty(self) -> int:
        """The first free slot without cached tokens."""
        return next(seq for seq in self.free if not self._cells.tokens[seq])

    def forget(self) -> None:
        """Drop the cached tokens of free slots."""
        if len(self.free) == self._count:
            self._cells.reset()
        for seq in self.free:
            self._cells.truncate(seq)

    def should_wait(self, prompt: IntArray, reading: Sequence[IntArray]) -> bool:
        """Whether a prompt should wait until one of those being read is cached, as both begin with the same tokens."""
        in_common = max((common_prefix(other, prompt) for other in reading), default=0)
        if in_common < WORTH_WAITING or not self._reuse:
            return False
        return in_common - max(common_prefix(cached, prompt) for cached in self._cells.tokens) >= WORTH_WAITING


def common_prefix(cached: Sequence[int] | IntArray, prompt: IntArray) -> int:
    """How many leading tokens both share."""
    n = min(len(cached), len(prompt))
    differs = np.asarray(cached[:n], dtype=np.int32) != prompt[:n]
    return int(differs.argmax()) if differs.any() else n
