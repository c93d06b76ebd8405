from collections.abc import Collection, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_constraint import Toy, by_place

from specplug.core import EMPTY, ROOT, Draft
from specplug.planning.constraint_cut import allowed_part


def paths(draft: Draft) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        found.append((*(() if parent == ROOT else found[parent]), token))
    return found


def test_forbidden_nodes_and_all_below_them_are_removed() -> None:
    """The constraint allows 1 or 2, then 3, then anything below 10."""
    constraint = by_place([{1, 2}, {3}, range(10)])
    #            1          2     8     3     4     3     9    3
    tree = Draft.of([1, 2, 8, 3, 4, 3, 9, 3], [ROOT, ROOT, ROOT, 0, 0, 1, 5, 2], [0, 1, 2, 3, 4, 5, 6, 7])
    part = allowed_part(tree, constraint)
    part.check(num_buckets=8)
    assert paths(part) == [(1,), (2,), (1, 3), (2, 3), (2, 3, 9)]
    assert part.buckets.tolist() == [0, 1, 3, 5, 6], "the nodes keep their buckets"


@pytest.mark.parametrize("draft", [EMPTY, Draft.chain([1, 3, 5], [0, 0, 0])])
def test_a_draft_that_is_allowed_stays_the_same_object(draft: Draft) -> None:
    assert allowed_part(draft, by_place([{1, 2}, {3}, range(10)])) is draft


def test_a_draft_without_an_allowed_token_is_empty() -> None:
    assert len(allowed_part(Draft.of([5, 6, 1], [ROOT, ROOT, 0], [0, 0, 0]), by_place([{1}, {1}]))) == 0


some_trees = st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 20)), max_size=20)


@given(some_trees, st.integers(0, 30))
def test_it_keeps_exactly_the_allowed_paths(nodes: list[tuple[int, int]], seed: int) -> None:
    tokens = [token for token, _ in nodes]
    parents = [min(parent, place - 1) for place, (_, parent) in enumerate(nodes)]
    draft = Draft.of(tokens, parents, [0] * len(nodes))

    def following(text: Sequence[int]) -> Collection[int]:
        return [token for token in range(4) if (hash((*text, token)) + seed) % 3]

    constraint = Toy(following)
    expected = [path for path in paths(draft) if constraint.allowed(path) == len(path)]
    assert paths(allowed_part(draft, constraint)) == expected
    assert constraint.text == [], "the constraint was not moved"
