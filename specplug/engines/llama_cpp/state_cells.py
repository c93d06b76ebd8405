"""Records the cached tokens of slots whose model keeps a recurrent state.

Such a state cannot be cut: a slot's text can be extended, dropped, or cut to a *checkpoint*, a place at which its
state was saved. Checkpoints are made while a prompt is read: before its last two messages, the second of which is the
beginning of the answer, or else before its last token; and where it parts from another slot's text.
Source: the places that a chat returns to, as in llama.cpp's server; sizes and traps: docs/lab-book/recurrent-memory.md.
State: per slot its tokens and at most MOST_CHECKPOINTS states.
Cost: saving or loading a state takes about 0.1 ms per MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from specplug.core import IntArray
from specplug.errors import SpecplugError, UsageError

MOST_CHECKPOINTS = 3
"""States of one slot; the one that was made first is dropped."""

SHORTEST = 64
"""Tokens. A shorter beginning is read again as fast as its state would be loaded."""


class StateMemory(Protocol):
    """The part of a `Context` that keeps states."""

    cells: int

    def drop(self, seq_id: int, start: int = -1) -> None: ...

    def copy(self, source: int, target: int) -> None: ...

    def state(self, seq_id: int) -> bytes: ...

    def restore(self, seq_id: int, state: bytes) -> None: ...

    def recurrent_state(self, seq_id: int) -> bytes: ...

    def return_to(self, seq_id: int, length: int, state: bytes) -> None: ...

    def clear(self) -> None: ...


class StateCells:
    """The texts of `slots` sequences with the ids 0..slots-1, in a context that is empty at first.

    Its methods are those of `Cells`. Nothing is retained, so that cells of several sequences may mix: a text may then
    differ from that of its single run by rounding.
    """

    def __init__(self, context: StateMemory, *, slots: int, message_token: int | None = None) -> None:
        """message_token  the token with which every message of a chat begins"""
        self._message_token = message_token
        self.context = context
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self._checkpoints: list[dict[int, bytes]] = [{} for _ in range(slots)]
        """By slot: the state after so many tokens."""

    # -- a pass ---------------------------------------------------------------------------------------------------

    def make_room(self, rows: int, idle: Sequence[int]) -> None:
        """As `Cells.make_room`."""
        for seq in idle:
            if self._held + rows <= self.context.cells:
                return
            self.truncate(seq)
        if self._held + rows > self.context.cells:
            raise SpecplugError(f"the KV cache of {self.context.cells} tokens is full; run fewer or shorter sequences")

    @property
    def _held(self) -> int:
        return sum(map(len, self.tokens))

    def append(self, seq: int, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Record that these tokens follow in a slot; where their cells are does not matter."""
        self.tokens[seq] += tokens

    def end_pass(self, rows: int) -> None:
        """A pass has ended."""

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def places(self, prompt: IntArray, cached: int, parting: int) -> list[int]:
        """Where to make checkpoints while a prompt (int32[n]) is read: numbers of its tokens, ascending.

        cached   tokens that the slot holds already
        parting  leading tokens that the prompt has in common with another slot's text
        """
        messages = np.flatnonzero(prompt == self._message_token).tolist() if self._message_token is not None else []
        wanted = {parting, *(messages[-2:] or [len(prompt) - 1])}
        return sorted(place for place in wanted if max(SHORTEST, cached + 1) <= place < len(prompt))

    def make_checkpoint(self, seq: int) -> None:
        """Save the state of a slot after all of its tokens."""
        kept = self._checkpoints[seq]
        kept.pop(len(self.tokens[seq]), None)
        while len(kept) >= MOST_CHECKPOINTS:
            del kept[next(iter(kept))]
        kept[len(self.tokens[seq])] = self.context.recurrent_state(seq)

    # -- the cached tokens of slots -------------------------------------------------------------------------------

    def reusable(self, seq: int, length: int) -> int:
        """To how many of its first `length` tokens a slot can be cut; most of them."""
        if length == len(self.tokens[seq]):
            return length
        return self.shareable(seq, length)

    def shareable(self, seq: int, length: int) -> int:
        """How many of a slot's first `length` tokens another slot can be given."""
        return max((place for place in self._checkpoints[seq] if place <= length), default=0)

    def truncate(self, seq: int, start: int = 0) -> None:
        """Cut a slot to `start` tokens, which `reusable` has returned, or drop them all."""
        if start == len(self.tokens[seq]):
            return
        if start:
            self.context.return_to(seq, start, self._checkpoints[seq][start])
        else:
            self.context.drop(seq)
        del self.tokens[seq][start:]
        self._checkpoints[seq] = {place: state for place, state in self._checkpoints[seq].items() if place <= start}

    def share(self, source: int, target: int, length: int) -> None:
        """Give an empty slot the first `length` tokens of another one, which `shareable` has returned."""
        self.context.copy(source, target)
        self.context.return_to(target, length, self._checkpoints[source][length])
        self.tokens[target] = self.tokens[source][:length]
        kept = self._checkpoints[source].items()
        self._checkpoints[target] = {place: state for place, state in kept if place <= length}

    def load(self, seq: int, tokens: Sequence[int], state: bytes) -> None:
        """Load `tokens`, whose state is `state`, into an empty slot."""
        self.context.restore(seq, state)
        self.tokens[seq] += tokens

    def reset(self) -> None:
        """Drop everything."""
        self.context.clear()
        for seq in range(len(self.tokens)):
            self.tokens[seq], self._checkpoints[seq] = [], {}

    # -- changes that the owner of the context makes itself -------------------------------------------------------

    def follow_truncation(self, seq: int, length: int) -> None:
        """The owner of the context has dropped the tokens of `seq` from `length` on: all of them, or none.

        UsageError for another length, as a state cannot be cut.
        """
        if not length:
            self.reset()
        elif length != len(self.tokens[seq]):
            raise UsageError(f"a recurrent state cannot be cut to {length} tokens; call reset, and evaluate them again")

    def follow_load(self, seq: int, tokens: IntArray) -> None:
        """The owner of the context has loaded a state in which `seq` holds `tokens` (int32[n])."""
        self.tokens[seq], self._checkpoints[seq] = tokens.tolist(), {}
