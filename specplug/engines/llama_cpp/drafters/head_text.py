"""What a head knows of the text of one slot: tokens with the target's hidden states, and which of them its cells hold.

A head reads *entries*: entry j is token j together with the target's state of token j - 1, and gives logits of token
j + 1. Works on one sequence id of the head's context, and runs no pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specplug.core import IntArray
from specplug.engines.llama_cpp.drafters.state_history import StateHistory, States
from specplug.engines.llama_cpp.slots import common_prefix


class Cells(Protocol):
    """The cells of a head: those of a context, or of several."""

    def drop(self, seq_id: int, start: int = -1, stop: int = -1) -> None:
        """Remove `seq_id` from the cells at positions [start, stop), by default from all."""

    def copy(self, source: int, target: int, start: int = -1, stop: int = -1) -> None:
        """Share the cells of `source` at positions [start, stop) with `target`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a kind of head arranges its entries.

    state_width  numbers of one of the target's states
    first        the first entry of a text: 0 where zeros stand in for the state before the first token, else 1
    """

    state_width: int
    first: int

    def position(self, entry: int) -> int:
        """The position of an entry in the head's cells."""
        return entry - self.first


class HeadText:
    """The text of one slot.

    start    the first token whose state is known: 0, unless the target had cached tokens that this head never got
    tokens   those from `start` on whose states are known, in order
    stored   the entries before this one are in the cells, from the first possible one on
    """

    def __init__(self, cells: Cells, seq: int, layout: Layout) -> None:
        self._cells = cells
        self._seq = seq
        self._layout = layout
        self._ahead: int | None = None
        """The token of the entry at `end`, where that is in the cells: the target has not read it yet."""
        self._reset(0)

    @property
    def end(self) -> int:
        """The tokens before this one are known with their states."""
        return self.start + len(self.tokens)

    @property
    def first(self) -> int:
        """The first entry that can be read."""
        return self._layout.first if not self.start else self.start + 1

    def states(self, first: int, stop: int) -> States:
        """float32[stop - first, width]: the target's states in the entries from `first` to `stop`, without it."""
        before = first - 1 - self.start
        if before >= 0:
            return self._states.rows(before, stop - 1 - self.start)
        # Before the first token there is none.
        zeros = np.zeros((1, self._layout.state_width), dtype=np.float32)
        return np.concatenate([zeros, self._states.rows(0, stop - 1 - self.start)])

    def forget(self, start: int = 0) -> None:
        """Begin again with a text whose tokens from `start` on will be known."""
        self._cells.drop(self._seq)
        self._reset(start)

    def begin(self, prompt: IntArray, others: Sequence[HeadText]) -> None:
        """Begin a text of which the target has cached `prompt` (int32[n]), with what this head knows of it.

        others  the texts of all slots
        """
        if not len(prompt):
            self.forget()
            return
        best = max((self, *others), key=lambda other: (other.shared(prompt), other is self))
        if best.shared(prompt) < len(prompt):
            self.forget(len(prompt))
        elif best is self:
            self._cut(len(prompt))
        else:
            self._copy(best, len(prompt))

    def shared(self, prompt: IntArray) -> int:
        """How many first tokens of a prompt are known here."""
        return 0 if self.start else common_prefix(self.tokens, prompt)

    def extend(self, position: int, tokens: Sequence[int], states: States) -> None:
        """The target has read and kept `tokens` from `position` on, with these states."""
        if position != self.end:
            self.forget(position)
        elif self._ahead is not None and tokens and self._ahead != tokens[0]:
            self._cut(self.end)
        self.tokens += tokens
        self._states.append(states)
        if tokens:
            self._ahead = None

    def add_stored(self, stop: int, last: int) -> None:
        """The entries before `stop` are now in the cells; `last` is the token of the last one."""
        self.stored = stop
        self._ahead = last if stop > self.end else None

    def cut_stored(self, stop: int) -> None:
        """Remove the entries from `stop` on from the cells."""
        if stop < self.stored:
            self.stored, self._ahead = stop, None
            self._cells.drop(self._seq, self._layout.position(stop))

    def drop_drafts(self) -> None:
        """Remove the entries of draft tokens from the cells."""
        self._cells.drop(self._seq, self._layout.position(self.stored))

    def drop_cells(self) -> None:
        """Remove all entries from the cells, also those that an interrupted pass has left; they can be read again."""
        self._cells.drop(self._seq)
        self.stored, self._ahead = self.first, None

    def _reset(self, start: int) -> None:
        self.start = start
        self.tokens: list[int] = []
        self._states = StateHistory(self._layout.state_width)
        self.stored, self._ahead = self.first, None

    def _cut(self, length: int) -> None:
        """Keep the first `length` tokens."""
        del self.tokens[length - self.start :]
        self._states.cut(length - self.start)
        self.cut_stored(max(self.first, length))

    def _copy(self, other: HeadText, length: int) -> None:
        """Take over the first `length` tokens of another text. Its cells are shared."""
        self.forget()
        self.tokens = other.tokens[:length]
        self._states = other._states.first(length)
        self.stored = max(self.first, min(other.stored, length))
        if self.stored > self.first:
            self._cells.copy(other._seq, self._seq, 0, self._layout.position(self.stored))
