from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.core import ROOT
from specplug.drafts.trees import likeliest, path_probabilities

Tree = tuple[list[int], list[float]]


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 8) -> Tree:
    """Parents come before children; the probabilities include ties, zeros and ones."""
    n = draw(st.integers(0, max_nodes))
    parents = [draw(st.integers(ROOT, node - 1)) for node in range(n)]
    chance = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0.0, 1.0))
    return parents, draw(st.lists(chance, min_size=n, max_size=n))


def is_subtree(nodes: list[int], parents: list[int]) -> bool:
    return all(parents[node] in {ROOT, *nodes} for node in nodes)


def product_to_the_root(node: int, parents: list[int], probabilities: list[float]) -> float:
    product = 1.0
    while node != ROOT:
        product *= probabilities[node]
        node = parents[node]
    return product


def test_path_probabilities_by_hand() -> None:
    """One branch 0.5, 0.5 x 0.4, 0.5 x 0.4 x 0.1 with a second child 0.5 x 0.2, and another branch 0.25."""
    parents, probabilities = [ROOT, 0, ROOT, 1, 0], [0.5, 0.4, 0.25, 0.1, 0.2]
    assert path_probabilities(parents, probabilities) == pytest.approx([0.5, 0.2, 0.25, 0.02, 0.1])


def test_an_empty_tree_has_no_probabilities() -> None:
    assert path_probabilities([], []) == []
    assert likeliest([], [], 3) == []


def test_there_must_be_one_probability_per_node() -> None:
    with pytest.raises(ValueError):
        path_probabilities([ROOT, 0], [0.5])


@given(trees())
def test_a_path_probability_is_the_product_up_to_the_root(tree: Tree) -> None:
    expected = [product_to_the_root(node, *tree) for node in range(len(tree[0]))]
    assert path_probabilities(*tree) == pytest.approx(expected)


def test_likeliest_by_hand() -> None:
    """Path probabilities 0.5, 0.4, 0.45, 0.045: the node with 0.9 of its parent's is behind the other root child."""
    parents, probabilities = [ROOT, 0, ROOT, 2], [0.5, 0.8, 0.45, 0.1]
    assert [likeliest(parents, probabilities, n) for n in range(6)] == [
        [],
        [0],
        [0, 2],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]


@given(trees(), st.integers(0, 10))
def test_likeliest_is_the_best_subtree_of_that_size(tree: Tree, count: int) -> None:
    parents, _ = tree
    n = len(parents)
    worth = [product_to_the_root(node, *tree) for node in range(n)]
    nodes = likeliest(*tree, count)
    assert nodes == sorted(set(nodes))
    assert len(nodes) == min(count, n)
    assert is_subtree(nodes, parents)
    best = max(
        sum(worth[node] for node in chosen)
        for chosen in combinations(range(n), min(count, n))
        if is_subtree(list(chosen), parents)
    )
    assert sum(worth[node] for node in nodes) == pytest.approx(best)


@given(trees(), st.integers(0, 8))
def test_a_larger_count_keeps_all_nodes_of_a_smaller_one(tree: Tree, count: int) -> None:
    assert set(likeliest(*tree, count)) <= set(likeliest(*tree, count + 1))
