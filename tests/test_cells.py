"""The order of cells, with a toy cache that allocates them as llama.cpp does: the first free ones from a head on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llama_cpp")

from specplug.engines.llama_cpp.cells import LEAST_RETAINED, Cells
from specplug.errors import SpecplugError

SLOTS = 3
RETAINED_ID = SLOTS


class ToyCache:
    """Cells with a position and owners each, under llama.cpp's rules for the head, freed cells and wrapping around."""

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.clear()

    def clear(self) -> None:
        self.position = [0] * self.cells
        self.owners: list[set[int]] = [set() for _ in range(self.cells)]
        self.head = 0

    def place(self, rows: list[tuple[int, int]]) -> list[int]:
        """The cells that the rows (sequence, position) of one pass get."""
        used = sum(map(bool, self.owners))
        at = 0 if self.head > used + 2 * len(rows) else self.head
        free = [cell for cell in [*range(at, self.cells), *range(at)] if not self.owners[cell]][: len(rows)]
        assert len(free) == len(rows), "no room"
        for cell, (seq, position) in zip(free, rows, strict=True):
            self.owners[cell], self.position[cell] = {seq}, position
        if free:
            self.head = free[-1] + 1
        return free

    def of(self, seq: int, start: int = 0, stop: int = -1) -> list[int]:
        inside = range(max(start, 0), stop if stop >= 0 else 1 << 30)
        return [cell for cell, owners in enumerate(self.owners) if seq in owners and self.position[cell] in inside]

    def drop(self, seq_id: int, start: int = -1) -> None:
        for cell in self.of(seq_id, start):
            self.owners[cell].discard(seq_id)
            if not self.owners[cell]:
                self.head = min(self.head, cell)

    def copy(self, source: int, target: int, start: int = -1, stop: int = -1) -> None:
        for cell in self.of(source, start, stop):
            self.owners[cell].add(target)

    def state(self, seq_id: int) -> bytes:
        return bytes(self.position[cell] for cell in self.of(seq_id))

    def restore(self, seq_id: int, state: bytes) -> None:
        self.place([(seq_id, position) for position in state])


def grow(cache: ToyCache, cells: Cells, seqs: list[int], count: int) -> None:
    """One pass that adds `count` tokens to each of `seqs`."""
    cells.make_room(count * len(seqs), [])
    rows = [(seq, len(cells.tokens[seq]) + i) for seq in seqs for i in range(count)]
    placed = cache.place(rows)
    assert placed == list(range(cells.used, cells.used + len(rows)))
    for n, seq in enumerate(seqs):
        cells.append(seq, [7] * count, range(n * count, (n + 1) * count))
    cells.end_pass(len(rows))


def check(cache: ToyCache, cells: Cells) -> None:
    """Check that each slot's positions ascend with its cells, and that no free cell lies before a taken one."""
    for seq in range(SLOTS):
        owned = cache.of(seq)
        assert [cache.position[cell] for cell in owned] == list(range(len(cells.tokens[seq])))
    taken = [bool(owners) for owners in cache.owners]
    assert taken == [True] * cells.used + [False] * (cache.cells - cells.used)


ACTIONS = st.one_of(
    st.tuples(st.just("grow"), st.sets(st.integers(0, 2), min_size=1), st.integers(1, 4)),
    st.tuples(st.just("truncate"), st.integers(0, 2), st.integers(0, 9)),
    st.tuples(st.just("share"), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("pack")),
)


@given(st.lists(ACTIONS, max_size=40))
def test_no_later_token_lies_before_an_earlier_one_after_any_actions(actions: list[tuple]) -> None:  # type: ignore[type-arg]
    cache = ToyCache(512)
    cells = Cells(cache, slots=SLOTS, retained_id=RETAINED_ID)
    for action in actions:
        if action[0] == "grow":
            if all(len(cells.tokens[seq]) < 60 for seq in action[1]):
                grow(cache, cells, sorted(action[1]), action[2])
        elif action[0] == "truncate":
            cells.truncate(action[1], min(action[2], len(cells.tokens[action[1]])))
        elif action[0] == "share":
            source, target = action[1:]
            if source != target and cells.tokens[source]:
                cells.truncate(target)
                cells.share(source, target, len(cells.tokens[source]))
        else:
            cells.pack()
            assert cells.used == sum(map(len, cells.tokens))
        check(cache, cells)


def test_a_later_token_lands_before_an_earlier_one_unless_cells_are_retained() -> None:
    """The toy cache reproduces what the class prevents."""
    cache = ToyCache(64)
    cache.place([(0, 0), (1, 0), (0, 1)])
    cache.drop(1)
    assert cache.place([(0, 2)]) == [1]


def test_the_cache_is_packed_once_it_holds_as_many_retained_cells_as_live_ones() -> None:
    cache = ToyCache(4 * LEAST_RETAINED)
    cells = Cells(cache, slots=SLOTS, retained_id=RETAINED_ID)
    grow(cache, cells, [0], LEAST_RETAINED - 1)
    grow(cache, cells, [1], 1)
    cells.truncate(0)
    cells.make_room(1, [])
    assert (cells.packed, cells.used) == (0, LEAST_RETAINED)
    grow(cache, cells, [0, 1], 1)
    cells.truncate(0)
    cells.make_room(1, [])
    assert (cells.packed, cells.used) == (1, 2)


def test_idle_slots_lose_their_tokens_before_the_cache_counts_as_full() -> None:
    cache = ToyCache(80)
    cells = Cells(cache, slots=SLOTS, retained_id=RETAINED_ID)
    for seq in range(SLOTS):
        grow(cache, cells, [seq], 25)
    cells.make_room(10, idle=[2, 0])
    assert [len(tokens) for tokens in cells.tokens] == [25, 25, 0]
    check(cache, cells)
    with pytest.raises(SpecplugError, match="the KV cache of 80 tokens is full"):
        cells.make_room(40, idle=[])


def test_shared_cells_are_only_freed_with_their_last_owner() -> None:
    cache = ToyCache(64)
    cells = Cells(cache, slots=SLOTS, retained_id=RETAINED_ID)
    grow(cache, cells, [0], 10)
    cells.share(0, 1, 6)
    cells.truncate(0)
    check(cache, cells)
    assert cache.of(1) == [0, 1, 2, 3, 4, 5] and np.count_nonzero([RETAINED_ID in o for o in cache.owners]) == 10
