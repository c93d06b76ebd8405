from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.core import EMPTY, ROOT, Bucket, Draft
from specplug.planning.acceptance import AcceptanceTable
from specplug.planning.constants import ACCEPTANCE_DECAY, PRIOR_WEIGHT


def table(*priors: float) -> AcceptanceTable:
    return AcceptanceTable([Bucket(f"bucket {i}", prior) for i, prior in enumerate(priors)])


def counts(found: AcceptanceTable) -> list[tuple[float, float]]:
    """The hits and misses of each bucket."""
    return list(zip(found.hits, found.misses, strict=True))


def seen(priors: Sequence[float], results: Sequence[Sequence[bool]]) -> list[tuple[float, float]]:
    """By definition: of n results the i-th counts ACCEPTANCE_DECAY ** (n - 1 - i), the prior ACCEPTANCE_DECAY ** n."""
    found = []
    for prior, line in zip(priors, results, strict=True):
        n = len(line)
        old = PRIOR_WEIGHT * ACCEPTANCE_DECAY**n
        found.append(
            (
                old * prior + sum(ACCEPTANCE_DECAY ** (n - 1 - i) for i, hit in enumerate(line) if hit),
                old * (1 - prior) + sum(ACCEPTANCE_DECAY ** (n - 1 - i) for i, hit in enumerate(line) if not hit),
            )
        )
    return found


def assert_counts(found: AcceptanceTable, expected: Sequence[tuple[float, float]]) -> None:
    for got, want in zip(counts(found), expected, strict=True):
        assert got == pytest.approx(want)


# -- one bucket ------------------------------------------------------------------------------------------------------


def test_before_anything_is_learned_the_prior_counts() -> None:
    assert table(0.5, 0.1, 1.0, 0.0).probability == pytest.approx([0.5, 0.1, 1.0, 0.0])
    assert table().probability == []


def test_one_hit_and_one_miss_by_hand() -> None:
    """The prior is 2 : 2. A hit makes it 1.98 + 1 : 1.98, then a miss 2.9502 : 1.9602 + 1."""
    found = table(0.5)
    found.learn(Draft.chain([7], [0]), [7])
    assert_counts(found, [(2.98, 1.98)])
    assert found.probability == pytest.approx([2.98 / 4.96])
    found.learn(Draft.chain([7], [0]), [8])
    assert_counts(found, [(2.9502, 2.9602)])
    assert found.probability == pytest.approx([2.9502 / 5.9104])


@given(st.floats(0.0, 1.0), st.lists(st.booleans(), max_size=60))
def test_old_results_decay(prior: float, results: list[bool]) -> None:
    found = table(prior)
    for hit in results:
        found.learn(Draft.chain([1], [0]), [1 if hit else 2])
    assert_counts(found, seen([prior], [results]))


def test_about_the_last_hundred_matter() -> None:
    """The weights sum to 1 / (1 - decay); after 1000 hits, 300 misses leave decay ** 300 of them."""
    found = table(0.5)
    for token in [1] * 1000 + [2] * 300:
        found.learn(Draft.chain([1], [0]), [token])
    assert found.hits[0] + found.misses[0] == pytest.approx(1 / (1 - ACCEPTANCE_DECAY), rel=0.01)
    assert found.probability[0] == pytest.approx(ACCEPTANCE_DECAY**300, rel=0.01)


def test_buckets_are_counted_apart() -> None:
    found = table(0.5, 0.3)
    found.learn(Draft.chain([7], [1]), [7])
    assert_counts(found, [(2.0, 2.0), (0.99 * 1.2 + 1, 0.99 * 2.8)])


# -- counting drafts that were not verified --------------------------------------------------------------------------


def test_an_empty_draft_changes_nothing() -> None:
    found = table(0.5)
    assert found.learn(EMPTY, [1, 2]) == 0
    assert_counts(found, [(2.0, 2.0)])


def test_the_children_of_reached_nodes_are_counted() -> None:
    """The text is 1 5 9. The nodes, with one bucket each, are 1 (hit) and 2 (miss); below 1: 4 (miss) and 5 (hit);
    below 2: 5 (not counted); below 5: 8 (miss); below 8: 9 (not counted)."""
    draft = Draft.of([1, 2, 4, 5, 5, 8, 9], [ROOT, ROOT, 0, 0, 1, 3, 5], list(range(7)))
    found = table(*[0.5] * 7)
    assert found.learn(draft, [1, 5, 9]) == 2
    assert_counts(found, seen([0.5] * 7, [[True], [False], [False], [True], [], [False], []]))


def test_draft_tokens_beyond_the_text_are_not_counted() -> None:
    found = table(0.5, 0.5, 0.5)
    assert found.learn(Draft.chain([1, 2, 3], [0, 1, 2]), [1, 2]) == 2
    assert_counts(found, seen([0.5] * 3, [[True], [True], []]))


def test_text_beyond_the_draft_is_no_miss() -> None:
    found = table(0.5)
    assert found.learn(Draft.chain([1], [0]), [1, 2, 3]) == 1
    assert_counts(found, seen([0.5], [[True]]))


def test_siblings_of_one_bucket_are_counted_in_their_order() -> None:
    found = table(0.5)
    found.learn(Draft.of([1, 2, 3], [ROOT] * 3, [0] * 3), [2])
    assert_counts(found, seen([0.5], [[False, True, False]]))


@st.composite
def drafts_and_texts(draw: st.DrawFn) -> tuple[Draft, list[int]]:
    """Drafts and texts of three different tokens; siblings have different ones."""
    places: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(0, 9))):
        place = draw(st.integers(ROOT, len(places) - 1)), draw(st.integers(0, 2))
        if place not in places:
            places.append(place)
    draft = Draft.of([token for _, token in places], [parent for parent, _ in places], range(len(places)))
    return draft, draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))


@given(drafts_and_texts())
def test_a_node_is_counted_if_the_path_of_its_parent_begins_the_text(case: tuple[Draft, list[int]]) -> None:
    draft, text = case
    draft.check()
    paths: list[list[int]] = []
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        paths.append([*(paths[parent] if parent != ROOT else []), token])
    expected = [
        [path == text[: len(path)]] if len(path) <= len(text) and path[:-1] == text[: len(path) - 1] else []
        for path in paths
    ]
    found = table(*[0.5] * len(draft))
    depth = found.learn(draft, text)
    assert_counts(found, seen([0.5] * len(draft), expected))
    assert depth == max((len(path) for path in paths if path == text[: len(path)]), default=0)


# -- between processes -----------------------------------------------------------------------------------------------


def test_counts_stored_in_a_profile_add_to_the_prior() -> None:
    """The prior 0.5 is 2 : 2; with 30 hits and 2 misses it is 32 : 4."""
    found = AcceptanceTable([Bucket("a", 0.5), Bucket("b", 0.25)], {"a": (30.0, 2.0)})
    assert found.probability == pytest.approx([32 / 36, 0.25])


def test_unknown_names_are_ignored() -> None:
    found = AcceptanceTable([Bucket("a", 0.5)], {"gone": (50.0, 0.0)})
    assert found.probability == [0.5]
    assert found.learned() == {}


def test_buckets_that_were_never_counted_are_not_stored() -> None:
    found = table(0.5, 0.2)
    found.learn(Draft.chain([1], [0]), [1])
    assert list(found.learned()) == ["bucket 0"]


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4),
    st.lists(st.tuples(st.floats(0.5, 99.0), st.floats(0.5, 99.0)), min_size=4, max_size=4),
)
def test_stored_counts_are_restored(priors: list[float], kept: list[tuple[float, float]]) -> None:
    buckets = [Bucket(f"bucket {i}", prior) for i, prior in enumerate(priors)]
    learned = {bucket.name: line for bucket, line in zip(buckets, kept, strict=False)}
    first = AcceptanceTable(buckets, learned)
    assert {name: pytest.approx(line) for name, line in first.learned().items()} == learned
    assert AcceptanceTable(buckets, first.learned()).probability == pytest.approx(first.probability)


def test_stored_counts_are_never_negative() -> None:
    """After 300 misses the hits are fewer than the prior's."""
    found = table(0.9)
    for _ in range(300):
        found.learn(Draft.chain([1], [0]), [2])
    (hits, misses) = found.learned()["bucket 0"]
    assert hits == 0.0 < misses
