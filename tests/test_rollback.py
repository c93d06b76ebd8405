"""Rollback over a toy cache: whatever trees are verified, by how many sequences at once, the cells stay in order."""

from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llama_cpp")

from test_cells import RETAINED_ID, SLOTS, ToyCache, check

from specplug.core import NO_LIMITS, ROOT, Draft, int_array
from specplug.engines.llama_cpp.cells import Cells
from specplug.engines.llama_cpp.rollback import AnyTail
from specplug.engines.llama_cpp.tree_batch import Tree, lay_out

FIRST_LEAF = RETAINED_ID + 1


class ToyContext(ToyCache):
    """A toy cache with a batch: each row has a position and sequence ids, and gets a cell when the pass runs."""

    def __init__(self, cells: int) -> None:
        super().__init__(cells)
        self.batch: list[tuple[tuple[int, ...], int]] = []

    @property
    def rows(self) -> int:
        return len(self.batch)

    def add(self, token: int, position: int, seq_ids: Any) -> None:
        self.batch.append((tuple(seq_ids), position))

    def add_span(self, tokens: Any, position: int, seq_id: int, *, wanted: bool) -> None:
        for offset in range(len(tokens)):
            self.add(tokens[offset], position + offset, (seq_id,))

    def decode(self) -> None:
        placed = self.place([(ids[0], position) for ids, position in self.batch])
        for cell, (ids, _) in zip(placed, self.batch, strict=True):
            self.owners[cell] = set(ids)
        self.batch = []


def draft_of(parents: list[int]) -> Draft:
    n = len(parents)
    return Draft(int_array(range(100, 100 + n)), int_array(parents), int_array([0] * n))


def accepted_path(draft: Draft, depth: int, choice: int) -> list[int]:
    """A path of at most `depth` nodes from the root; `choice` picks among the children."""
    path: list[int] = []
    for _ in range(depth):
        children = np.flatnonzero(draft.parents == (path[-1] if path else ROOT)).tolist()
        if not children:
            break
        path.append(children[choice % len(children)])
    return path


def parents_of(numbers: list[int]) -> list[int]:
    return [number % (i + 1) - 1 for i, number in enumerate(numbers)]


STEPS = st.lists(
    st.lists(
        st.tuples(st.lists(st.integers(0, 99), max_size=7).map(parents_of), st.integers(0, 4), st.integers(0, 3)),
        min_size=1,
        max_size=3,
    ),
    max_size=12,
)


@given(STEPS)
@settings(max_examples=150)
def test_cells_stay_in_order_whatever_is_accepted(steps: list[list[tuple[list[int], int, int]]]) -> None:
    context = ToyContext(4096)
    cells = Cells(context, slots=SLOTS, retained_id=RETAINED_ID)
    rollback, held = AnyTail(), [0] * SLOTS
    assert rollback.limits == NO_LIMITS
    for step in steps:
        leaves = count(FIRST_LEAF)
        cells.make_room(sum(1 + len(parents) for parents, _, _ in step), [])
        trees: list[Tree] = []
        for seq, (parents, depth, choice) in enumerate(step):
            draft = draft_of(parents)
            tree = lay_out(context, draft, 7, held[seq], seq, leaves)  # type: ignore[arg-type]
            tree.accepted = accepted_path(draft, depth, choice)
            trees.append(tree)
        context.decode()
        rows = max(max([tree.first, *(tree.row_of[node] for node in tree.accepted)]) for tree in trees) + 1
        for seq, tree in enumerate(trees):
            expected = [*cells.tokens[seq], 7, *tree.draft.tokens[tree.accepted].tolist()]
            held[seq] = rollback.keep(cells, tree, seq, 7, held[seq], rows)
            assert (held[seq], cells.tokens[seq]) == (len(expected), expected)
        cells.end_pass(rows)
        check(context, cells)
        assert not any(leaf in owners for owners in context.owners for leaf in range(FIRST_LEAF, FIRST_LEAF + 40))
