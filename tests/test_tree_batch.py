"""How a tree is laid out over sequence ids; the tests of the engine show what llama.cpp does with them."""

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llama_cpp")

from specplug.core import EMPTY, ROOT, Draft
from specplug.drafts.trees import first_branch
from specplug.engines.llama_cpp.tree_batch import Tree, _branches

SLOT, FIRST_LEAF = 3, 100


@st.composite
def parent_lists(draw: st.DrawFn, min_nodes: int = 1) -> list[int]:
    return [draw(st.integers(ROOT, node - 1)) for node in range(draw(st.integers(min_nodes, 12)))]


def to_root(node: int, parents: list[int]) -> list[int]:
    path = []
    while node != ROOT:
        path.append(node)
        node = parents[node]
    return path


def leaves(parents: list[int]) -> list[int]:
    return [node for node in range(len(parents)) if node not in parents]


def depth_first(node: int, parents: list[int]) -> list[int]:
    """The nodes below `node` by recursion, older siblings first."""
    return [
        found
        for child, parent in enumerate(parents)
        if parent == node
        for found in [child, *depth_first(child, parents)]
    ]


def test_a_tree_worked_out_by_hand() -> None:
    """Nodes 0 and 3 are below the root, 1 and 2 below 0, and 4 below 3. The leaves are 1, 2 and 4, in this order."""
    order, ids, leaf_of, extra = _branches([ROOT, 0, 0, ROOT, 3], SLOT, iter([7, 8]))
    assert order == [0, 1, 2, 3, 4]
    assert extra == [7, 8]
    assert [sorted(line) for line in ids[:5]] == [[3, 7], [3], [7], [8], [8]]
    assert leaf_of[1:] == [3, 7, 8, 8]


@given(parent_lists())
def test_depth_first_with_parents_before_children(parents: list[int]) -> None:
    order, _, _, _ = _branches(parents, SLOT, count(FIRST_LEAF))
    assert order == depth_first(ROOT, parents)
    assert all(order.index(parent) < order.index(node) for node, parent in enumerate(parents) if parent != ROOT)


@given(parent_lists())
def test_one_id_per_leaf_and_the_first_is_the_slots_own(parents: list[int]) -> None:
    order, ids, _, extra = _branches(parents, SLOT, count(FIRST_LEAF))
    ends = [node for node in order if node in leaves(parents)]
    assert extra == list(range(FIRST_LEAF, FIRST_LEAF + len(ends) - 1))
    assert [ids[node] for node in ends] == [[each] for each in [SLOT, *extra]]


@given(parent_lists())
def test_a_node_carries_exactly_the_ids_of_the_leaves_below(parents: list[int]) -> None:
    _, ids, leaf_of, _ = _branches(parents, SLOT, count(FIRST_LEAF))
    ends = leaves(parents)
    for node in range(len(parents)):
        below = [ids[leaf][0] for leaf in ends if node in to_root(leaf, parents)]
        assert sorted(ids[node]) == sorted(below)
        assert leaf_of[node] in below
    assert len(leaf_of) == len(parents)


@given(parent_lists())
def test_attention_sees_exactly_the_ancestors(parents: list[int]) -> None:
    """A node sees the earlier cells of its own ids; on each of these ids they are the path to the root and no more."""
    order, ids, leaf_of, _ = _branches(parents, SLOT, count(FIRST_LEAF))
    for node in range(len(parents)):
        for leaf in ids[node]:
            seen = [other for other in order[: order.index(node)] if leaf in ids[other]]
            assert seen == to_root(parents[node], parents)[::-1]
        assert leaf_of[node] in ids[node]


@given(parent_lists(min_nodes=0))
def test_the_first_branch_is_laid_out_first_on_the_slots_own_id(parents: list[int]) -> None:
    branch = first_branch(parents)
    order, ids, leaf_of, _ = _branches(parents, SLOT, count(FIRST_LEAF))
    assert order[: len(branch)] == branch
    assert [node for node in order if SLOT in ids[node]] == branch
    if branch:
        assert branch == to_root(branch[-1], parents)[::-1]
        assert branch[-1] in leaves(parents)
        assert {leaf_of[node] for node in branch} == {SLOT}


def test_an_empty_draft_has_no_branch() -> None:
    assert first_branch([]) == []


def test_no_more_ids_are_taken_than_used() -> None:
    ids = count(FIRST_LEAF)
    _branches([ROOT, 0, 1], SLOT, ids)
    assert next(ids) == FIRST_LEAF
    _branches([ROOT, ROOT, ROOT], SLOT, ids)
    assert next(ids) == FIRST_LEAF + 3


def test_children_by_parent_and_token() -> None:
    draft = Draft.of([5, 6, 5], [ROOT, 0, 0], [0, 0, 0])
    assert Tree(draft, 0, 0, [], [], [], 4).children() == {(ROOT, 5): 0, (0, 6): 1, (0, 5): 2}
    assert Tree(EMPTY, 0, 0, [], [], [], 1).children() == {}
