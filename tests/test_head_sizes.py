"""Figures of heads by size: nested sets, tokens per pass, MBSU and predicted speed, computed by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.build.head_sizes import (
    Costs,
    Selection,
    Size,
    added,
    best_in_each,
    emitted_per_pass,
    fastest,
    kept,
    mbsu,
    predicted,
    sizes,
)
from specplug.core import IntArray, int_array
from specplug.errors import UsageError
from specplug.transforms.kept_ids import Vocabulary

NESTED = [int_array([1, 4]), int_array([1, 2, 4]), int_array([0, 1, 2, 3, 4, 5])]


def hits(text: str) -> np.ndarray:
    return np.array([mark == "+" for mark in text])


def test_the_ids_that_each_set_adds() -> None:
    assert [part.tolist() for part in added(NESTED)] == [[1, 4], [2], [0, 3, 5]]


def test_the_most_likely_id_within_every_nested_set() -> None:
    logits = np.array(
        [
            [0.0, 2.0, 1.0, 0.5, 3.0, 9.0],  # id 4 in the smaller sets, id 5 in the full one
            [0.0, 1.0, 7.0, 0.5, 0.0, 5.0],  # id 1, then id 2, which remains the best
            [4.0, 4.0, 4.0, 4.0, 4.0, 4.0],  # of equal logits the lowest id, as argmax does
        ],
        dtype=np.float32,
    )
    assert best_in_each(logits, added(NESTED)).tolist() == [[4, 4, 5], [1, 2, 2], [1, 1, 0]]


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_the_most_likely_ids_equal_those_of_a_masked_full_head(seed: int, num_tokens: int) -> None:
    random = np.random.default_rng(seed)
    order = random.permutation(num_tokens)
    cuts = sorted({*random.integers(1, num_tokens + 1, 3).tolist(), num_tokens})
    nested = [np.sort(order[:cut]).astype(np.int32) for cut in cuts]
    logits = random.integers(-3, 3, (5, num_tokens)).astype(np.float32)  # few distinct values, so that many are equal
    found = best_in_each(logits, added(nested))
    for column, ids in enumerate(nested):
        masked = np.full_like(logits, -np.inf)
        masked[:, ids] = logits[:, ids]
        assert found[:, column].tolist() == masked.argmax(axis=1).tolist()


@pytest.mark.parametrize(
    ("marks", "gamma", "expected"),
    [
        ("----", 4, 1.0),  # every pass yields the target's own token
        ("++++++++++", 4, 5.0),  # twice 4 accepted tokens and the target's own
        ("++-+", 4, 2.0),  # 2 accepted and the target's own instead of the third; then 1 accepted, and the answer ends
        ("+-+-+-", 1, 2.0),
        ("+++-++-+", 2, 8 / 4),  # ++(+) -: the third token is the target's own; -; ++(-); +
        ("+++-++-+", 8, 8 / 3),  # +++(-) ++(-) +
    ],
)
def test_tokens_per_pass_of_a_chain(marks: str, gamma: int, expected: float) -> None:
    assert emitted_per_pass([hits(marks)], gamma) == pytest.approx(expected)


def test_tokens_per_pass_over_several_answers_are_weighted_by_passes() -> None:
    assert emitted_per_pass([hits("++++"), hits("---"), hits("")], 4) == pytest.approx(7 / 4)


def test_mbsu_is_tokens_per_byte() -> None:
    """A drafter reads a quarter of the target's bytes: four draft tokens cost one pass more, so that 3 tokens cost the
    bytes of 2 passes."""
    assert mbsu(3.0, 0.25, 4) == pytest.approx(1.5)
    assert mbsu(1.0, 0.0, 4) == 1.0


def test_a_draft_step_is_a_line_through_two_sizes() -> None:
    costs = Costs([10.0], [(100, 2.0), (10, 1.1)])
    assert [costs.draft_ms(rows) for rows in (10, 50, 100)] == pytest.approx([1.1, 1.5, 2.0])
    assert Costs([10.0], [(100, 2.0)]).draft_ms(50) == 2.0
    # The time falls with rows only by noise, so that a row costs no time.
    assert Costs([10.0], [(100, 1.0), (10, 1.2)]).draft_ms(50) == pytest.approx(1.0)


def test_the_predicted_speed_is_that_of_the_best_draft_length() -> None:
    """All eight draft tokens are accepted: drafts of 1 yield 2 per pass, 20 / 13; drafts of 2 yield 8 in 3 passes,
    80 / 3 / 16."""
    costs = Costs([10.0, 12.0, 14.0], [(100, 1.0)])
    assert predicted([hits("++++++++")], costs, 100) == (2, pytest.approx(80 / 3 / 16))
    assert predicted([hits("--------")], costs, 100) == (1, pytest.approx(10 / 13))


def test_the_fastest_size_is_the_smallest_of_equal_ones() -> None:
    table = [Size(n, 1.0, 1, predicted=speed) for n, speed in ((4, 1.1), (8, 1.3), (16, 1.3), (32, 0.9))]
    assert fastest(table).rows == 8


def test_the_numbers_of_rows_to_look_at() -> None:
    assert sizes(49152, 100) == [4096, 8192, 16384, 32768, 49152]
    assert sizes(49152, 6000, 10016) == [8192, 10016, 16384, 32768, 49152]
    assert sizes(300, 10) == [300]
    assert sizes(32768, 10, 32768) == [4096, 8192, 16384, 32768]


@given(st.integers(0, 2**32 - 1))
def test_kept_sets_are_nested_and_contain_the_ids_that_are_always_kept(seed: int) -> None:
    random = np.random.default_rng(seed)
    counts = random.integers(0, 4, 256)
    vocabulary = Vocabulary([b"x"] * 255 + [b" "], frozenset({7, 200}))
    found = kept(counts, vocabulary.always_kept(), (32, 64, 160, 256))
    assert [len(ids) for ids in found] == [32, 64, 160, 256]
    for small, large in itertools.pairwise(found):
        assert {7, 200, 255} <= set(small.tolist()) <= set(large.tolist())


def always() -> IntArray:
    return int_array(range(40))


@pytest.mark.parametrize("asked", [{}, {"size": 64, "auto": True}, {"size": 64, "coverage": 0.9}])
def test_the_number_of_rows_is_named_in_exactly_one_way(asked: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="use one of --size, --coverage and --auto"):
        Selection(**asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Selection(size=0), "use 1 to 1000"),
        (Selection(size=1001), "use 1 to 1000"),
        (Selection(size=39), "alone are 40"),
        (Selection(coverage=0.0), "above 0, up to 1"),
        (Selection(coverage=1.5), "above 0, up to 1"),
        (Selection(coverage=float("nan")), "above 0, up to 1"),
    ],
    ids=lambda value: str(value),
)
def test_impossible_sizes_are_refused(asked: Selection, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        asked.rows(np.ones(1000, dtype=np.int64), always(), np.ones(1000, dtype=np.int64))


def test_the_number_of_rows_is_rounded_up() -> None:
    counts = np.zeros(1000, dtype=np.int64)
    counts[100:200] = 1  # a hundred tokens, one each
    assert Selection(size=64).rows(counts, always(), counts) == 64
    assert Selection(size=65).rows(counts, always(), counts) == 96  # multiples of 32
    # 40 are always kept and 50 of the hundred counted: 90.
    assert Selection(coverage=0.5).rows(counts, always(), counts) == 96
    assert Selection(auto=True).rows(counts, always(), counts) is None
