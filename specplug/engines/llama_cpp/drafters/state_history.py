"""The hidden states of a text, one row per token, in half the space: float16 numbers with a power of two for each row.

Depends on arrays alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

States = npt.NDArray[np.float32]
"""float32[rows, width]"""

TOP = 15
"""The largest number of a row is kept as one below 2 to this power; float16 ends at 2 to the power of 16."""

MOST = 126
"""The largest power of two by which a row is multiplied: that, and its inverse, are numbers of float32."""

MOST_WAITING = 64
"""Rows that wait at most before they are converted together: as long as none is read, each costs next to nothing."""

LEAST_ROWS = 256
"""Rows for which there is room at first; the room doubles when it is full."""


class StateHistory:
    """States float32[n, width], each kept to 11 bits of its own size, unless it is a billionth of the largest in its
    row. State: 2 bytes per number; 4 for the rows that wait to be converted."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._length = 0
        self._numbers = np.zeros((0, width), dtype=np.float16)
        self._scales = np.zeros(0, dtype=np.float32)
        self._waiting: list[States] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._length + self._num_waiting

    def append(self, states: States) -> None:
        """Add rows, float32[n, width], which the history owns from now on."""
        self._waiting.append(states)
        self._num_waiting += len(states)
        if self._num_waiting >= MOST_WAITING:
            self._convert()

    def _convert(self) -> None:
        """Convert the rows that wait."""
        if not self._waiting:
            return
        states = np.concatenate(self._waiting)
        self._waiting, self._num_waiting = [], 0
        length = self._length + len(states)
        if length > len(self._numbers):
            self._make_room(max(length, 2 * len(self._numbers), LEAST_ROWS))
        largest = np.maximum(states.max(axis=1, initial=0.0), -states.min(axis=1, initial=0.0))
        powers = np.clip(TOP - np.frexp(largest)[1], -MOST, MOST)
        scale = np.exp2(powers).astype(np.float32)
        self._numbers[self._length : length] = states * scale[:, None]
        self._scales[self._length : length] = 1 / scale
        self._length = length

    def rows(self, start: int, stop: int) -> States:
        """float32[stop - start, width]; 0 <= start <= stop <= len(self)."""
        self._convert()
        assert 0 <= start <= stop <= self._length
        restored: States = self._numbers[start:stop].astype(np.float32) * self._scales[start:stop, None]
        return restored

    def cut(self, length: int) -> None:
        """Keep the first `length` rows."""
        self._convert()
        self._length = min(self._length, length)

    def first(self, length: int) -> StateHistory:
        """A copy of the first `length` rows."""
        self._convert()
        copied = StateHistory(self.width)
        copied._numbers = self._numbers[:length].copy()
        copied._scales = self._scales[:length].copy()
        copied._length = length
        return copied

    def _make_room(self, rows: int) -> None:
        numbers, scales = self._numbers, self._scales
        self._numbers = np.zeros((rows, self.width), dtype=np.float16)
        self._scales = np.zeros(rows, dtype=np.float32)
        self._numbers[: self._length] = numbers[: self._length]
        self._scales[: self._length] = scales[: self._length]
