"""Records which KV cell holds which token, and keeps the cells of every sequence in the order of its tokens.

Attention sums over a sequence's cells in the order of the cells, and in 4- and 8-bit weights the smallest change of
such a sum can change a token. llama.cpp puts the rows of a pass into the first free cells that it finds. So no free
cell may precede a taken one: a cell whose token is no longer needed stays taken (*retained*, on a sequence id that
nothing attends to) until `pack` saves the live cells and loads them again without gaps. The rows of a pass then get the
cells that follow the last taken one, in order.

State: per slot a token id and a cell number for every token in the cache.
Cost: `pack` copies the keys and values of every live token twice. It runs when as many cells are retained as live.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specplug.core import IntArray
from specplug.errors import SpecplugError

LEAST_RETAINED = 512
"""Fewer retained cells than this are not worth the pause for packing: an eighth of the default context. With flash
attention masked cells cost a pass next to nothing; without it they make every row slower."""

SPARE_SHARE = 8
"""One cell in this many is left for retained cells between two packings."""


class KvCache(Protocol):
    """The part of a `Context` that owns cells."""

    cells: int

    def drop(self, seq_id: int, start: int = -1) -> None: ...

    def copy(self, source: int, target: int, start: int = -1, stop: int = -1) -> None: ...

    def state(self, seq_id: int) -> bytes: ...

    def restore(self, seq_id: int, state: bytes) -> None: ...

    def clear(self) -> None: ...


class Cells:
    """The cells of `slots` sequences with the ids 0..slots-1, in a context that is empty at first."""

    def __init__(self, context: KvCache, *, slots: int, retained_id: int) -> None:
        self.context = context
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        """The cached tokens of each slot, by position."""
        self.used = 0
        """Cells taken; all free cells follow them."""
        self.packed = 0
        """How often `pack` has run."""
        self._cells: list[list[int]] = [[] for _ in range(slots)]
        self._retained_id = retained_id
        self._retained = 0  # an upper bound: cells that two slots share may be counted although one still needs them

    # -- a pass ---------------------------------------------------------------------------------------------------

    def make_room(self, rows: int, idle: Sequence[int]) -> None:
        """Make sure that `rows` cells are free; packs where they are not, or where most cells are retained.

        idle  slots whose cached tokens may be dropped to make room, in this order
        Raises SpecplugError where the cache is too small.
        """
        if self.used + rows <= self.context.cells and self._retained < max(LEAST_RETAINED, self.used - self._retained):
            return
        live = sum(map(len, self._cells))  # after packing nothing is shared any more
        # Leave room for more than this pass, so that the next one need not pack again.
        comfortable = self.context.cells - max(rows, self.context.cells // SPARE_SHARE)
        for seq in idle:
            if live <= comfortable:
                break
            live -= len(self._cells[seq])
            self.truncate(seq)
        if live + rows > self.context.cells:
            raise SpecplugError(f"the KV cache of {self.context.cells} tokens is full; run fewer or shorter sequences")
        self.pack()

    def append(self, seq: int, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Record that these rows of the pass under way are the next tokens of a slot."""
        self.tokens[seq] += tokens
        self._cells[seq] += [self.used + row for row in rows]

    def retain(self, seq_id: int, start: int, stop: int) -> None:
        """Keep the cells of `seq_id` at positions [start, stop) taken, which are about to be dropped."""
        self.context.copy(seq_id, self._retained_id, start, stop)
        self._retained += stop - start

    def end_pass(self, rows: int) -> None:
        """End a pass: the cells of its first `rows` rows stay taken."""
        self.used += rows

    # -- the cached tokens of slots -------------------------------------------------------------------------------

    def places(self, prompt: IntArray, cached: int, parting: int) -> list[int]:
        """Where to make checkpoints while a prompt is read: nowhere, as any tail can be dropped."""
        return []

    def make_checkpoint(self, seq: int) -> None:
        """See `places`."""

    def reusable(self, seq: int, length: int) -> int:
        """To how many of its first `length` tokens a slot can be cut."""
        return length

    def shareable(self, seq: int, length: int) -> int:
        """How many of a slot's first `length` tokens another slot can be given."""
        return length

    def truncate(self, seq: int, start: int = 0) -> None:
        """Drop the cached tokens of a slot from position `start` on."""
        dead = self._cells[seq][start:]
        if not dead:
            return
        del self._cells[seq][start:], self.tokens[seq][start:]
        last = max((cells[-1] for cells in self._cells if cells), default=-1)
        if last < 0:  # nothing is needed any more, so the next text starts at the first cell
            self.reset()
            return
        if last < dead[0] and self.used - dead[0] == len(dead):  # nothing follows them
            self.used = dead[0]
        else:
            self.retain(seq, start, start + len(dead))
        self.context.drop(seq, start)

    def share(self, source: int, target: int, length: int) -> None:
        """Give an empty slot the first `length` tokens of another one. Nothing is copied: both own the cells."""
        self.context.copy(source, target, 0, length)
        self.tokens[target] = self.tokens[source][:length]
        self._cells[target] = self._cells[source][:length]

    def load(self, seq: int, tokens: Sequence[int], state: bytes) -> None:
        """Load `tokens`, whose keys and values are in `state`, into an empty slot."""
        self.context.restore(seq, state)
        self.append(seq, tokens, range(len(tokens)))
        self.end_pass(len(tokens))

    def pack(self) -> None:
        """Copy all live tokens to the beginning of the cache, each slot's together and in order."""
        states = [(seq, self.context.state(seq)) for seq, cells in enumerate(self._cells) if cells]
        self.context.clear()
        self.used = self._retained = 0
        for seq, state in states:
            self.context.restore(seq, state)
            length = len(self._cells[seq])
            self._cells[seq] = list(range(self.used, self.used + length))
            self.used += length
        self.packed += 1

    def reset(self) -> None:
        """Drop everything."""
        self.context.clear()
        for seq in range(len(self.tokens)):
            self.tokens[seq], self._cells[seq] = [], []
        self.used = self._retained = 0

    # -- changes that the owner of the context makes itself -------------------------------------------------------

    def follow_truncation(self, seq: int, length: int) -> None:
        """The owner of the context has dropped all positions from `length` on, of every id; only `seq` is in use."""
        del self._cells[seq][length:], self.tokens[seq][length:]
        if self._cells[seq] == list(range(length)):
            self.context.drop(self._retained_id)
            self.used, self._retained = length, 0
        else:  # a retained cell was dropped before a cell that is still needed
            self.pack()

    def follow_load(self, seq: int, tokens: IntArray) -> None:
        """The owner of the context has loaded a state in which `seq` holds `tokens` (int32[n]), in unknown cells."""
        self.tokens[seq], self._cells[seq] = tokens.tolist(), [0] * len(tokens)
        self.pack()
