"""Which KV cell holds which token of which sequence, so that no sequence ever has a later token before an earlier one.

Knows cells, positions and sequence ids. Knows neither drafts nor what a token means.
llama.cpp gives every row of a pass the first free cells it finds. Here there is never a free cell before a taken one:
what is dropped in the middle stays taken, on an id that nobody attends to (junk), until `pack` copies what lives out
and in again, without gaps. So the rows of a pass get the cells that follow, in order, and attention sums over every
sequence as it would if that one were alone.
Keeps: per slot a token id and a cell number for every token in the cache.
Cost: `pack` copies every living token's keys and values twice; it comes once per so many dead tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specplug.errors import SpecplugError

LEAST_JUNK = 1024
"""Dead cells below which packing is not worth a pause; passes look at them for next to nothing."""

SPARE_SHARE = 8
"""One cell in so many is for what dies between two packings."""


class KvCache(Protocol):
    """What is asked of a context."""

    cells: int

    def drop(self, seq_id: int, start: int = -1) -> None: ...

    def copy(self, source: int, target: int, start: int = -1, stop: int = -1) -> None: ...

    def state(self, seq_id: int) -> bytes: ...

    def restore(self, seq_id: int, state: bytes) -> None: ...

    def clear(self) -> None: ...


class Cells:
    """The cache of `slots` sequences, ids 0..slots-1. The context must be empty."""

    def __init__(self, context: KvCache, *, slots: int, junk_id: int) -> None:
        self.context = context
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        """What each slot holds, by position."""
        self._cells: list[list[int]] = [[] for _ in range(slots)]
        self._junk_id = junk_id
        self.used = 0
        """Cells taken; all others follow them."""
        self._junk = 0  # an upper bound: cells that two slots share may be counted and still live
        self.packed = 0
        """Times that `pack` ran."""

    def took(self, seq: int, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Rows of the pass under way are a slot's next tokens; `passed` ends that pass."""
        self.tokens[seq] += tokens
        self._cells[seq] += [self.used + row for row in rows]

    def junk(self, seq_id: int, start: int, stop: int) -> None:
        """Let cells that are about to lose their owner stay taken."""
        self.context.copy(seq_id, self._junk_id, start, stop)
        self._junk += stop - start

    def passed(self, rows: int) -> None:
        """A pass is over, and the cells of its first `rows` rows stay taken."""
        self.used += rows

    def truncate(self, seq: int, start: int = 0) -> None:
        """A slot forgets its tokens from position `start` on."""
        dead = self._cells[seq][start:]
        if not dead:
            return
        del self._cells[seq][start:], self.tokens[seq][start:]
        last = max((cells[-1] for cells in self._cells if cells), default=-1)
        if last < dead[0] and self.used - dead[0] == len(dead):  # they are the last of all
            self.used = dead[0]
        else:
            self.junk(seq, start, start + len(dead))
        self.context.drop(seq, start)

    def share(self, source: int, target: int, length: int) -> None:
        """A slot that holds nothing gets the first `length` tokens of another: no copy, the cells belong to both."""
        self.context.copy(source, target, 0, length)
        self.tokens[target] = self.tokens[source][:length]
        self._cells[target] = self._cells[source][:length]

    def make_room(self, rows: int, idle: Sequence[int]) -> None:
        """See to `rows` free cells; packs where there are none, or where much is dead.

        idle  slots that hold tokens nobody waits for, the first to be forgotten first
        """
        if self.used + rows <= self.context.cells and self._junk < max(LEAST_JUNK, self.used - self._junk):
            return
        living = sum(map(len, self._cells))  # packed, every slot has its own
        # With room for more than this pass, or the next one would have to pack again.
        comfortable = self.context.cells - max(rows, self.context.cells // SPARE_SHARE)
        for seq in idle:
            if living <= comfortable:
                break
            living -= len(self._cells[seq])
            self.truncate(seq)
        if living + rows > self.context.cells:
            raise SpecplugError(f"the KV cache of {self.context.cells} tokens is full; let fewer tokens in at once")
        self.pack()

    def pack(self) -> None:
        """Copy everything that lives to the beginning of the cache, each slot's tokens together and in order."""
        states = [(seq, self.context.state(seq)) for seq, cells in enumerate(self._cells) if cells]
        self.context.clear()
        self.used = self._junk = 0
        for seq, state in states:
            self.context.restore(seq, state)
            length = len(self._cells[seq])
            self._cells[seq] = list(range(self.used, self.used + length))
            self.used += length
        self.packed += 1

    def reset(self) -> None:
        """Forget everything."""
        self.context.clear()
        for seq in range(len(self.tokens)):
            self.tokens[seq], self._cells[seq] = [], []
        self.used = self._junk = 0
