"""Draft tokens by batch size, from measured times of steps."""

from itertools import pairwise

import pytest

from specplug.engines.vllm.measure import curves_of
from specplug.planning.batch_size_schedule import (
    best_length,
    expected_tokens,
    in_words,
    length_at,
    lengths_of,
    ranges_of,
)
from specplug.profile import CostPoints

TOKENS = (1.0, 1.4, 1.6, 1.7)


def test_the_length_with_the_most_tokens_per_millisecond_is_chosen() -> None:
    assert best_length(TOKENS, (10, 10, 10, 10)) == 3
    assert best_length(TOKENS, (10, 11, 14, 18)) == 1
    assert best_length(TOKENS, (10, 15, 20, 25)) == 0


def test_nothing_is_drafted_where_not_speculating_is_as_fast() -> None:
    assert best_length(TOKENS, (10, 13.9, 20, 30)) == 0  # 1.007 times as fast: below the least speedup
    assert best_length(TOKENS, (8, 12, 14, 18)) == 0


def test_other_proposers_are_expected_to_draft_no_better_than_token_recycling() -> None:
    assert expected_tokens(["token_recycling", "suffix"], 2) == [1.0, 1.42, 1.62]
    assert expected_tokens(["datastore", "suffix", "third_party"], 10) == expected_tokens(["suffix"], 10)
    assert expected_tokens(["third_party"], 10) == expected_tokens(["token_recycling"], 10)
    lines = [expected_tokens(methods, 10) for methods in (["suffix", "token_recycling"], ["suffix"], [])]
    for better, worse in pairwise(lines):
        assert len(better) == 11 and all(one >= other for one, other in zip(better, worse, strict=True))


def test_ranges_are_looked_up_and_described() -> None:
    ranges = ((1, 1, 6), (2, 8, 4), (9, 64, 0))
    assert [length_at(ranges, size) for size in (0, 1, 2, 8, 9, 64, 65)] == [0, 6, 4, 4, 0, 0, 0]
    assert length_at(((1, 4, 3),), 5) == 3, "as in vLLM"
    assert in_words(ranges) == "6 for 1, 4 for 2 to 8, 0 for 9 to 64"


@pytest.mark.parametrize(
    ("lengths", "most", "ranges"),
    [
        ({1: 4, 4: 2, 16: 0}, 64, ((1, 1, 4), (2, 7, 2), (8, 64, 0))),
        ({1: 4, 4: 4, 16: 1}, 16, ((1, 7, 4), (8, 16, 1))),
        ({1: 4, 4: 2}, 64, ((1, 1, 4), (2, 4, 2), (5, 64, 0))),
        ({1: 4, 4: 2}, 1, ((1, 1, 4),)),
        ({4: 3}, 8, ((1, 4, 3), (5, 8, 0))),
        ({}, 8, ((1, 8, 0),)),
    ],
)
def test_ranges_cover_every_batch_size(
    lengths: dict[int, int], most: int, ranges: tuple[tuple[int, int, int], ...]
) -> None:
    assert ranges_of(lengths, most) == ranges


def test_lengths_follow_from_timed_steps() -> None:
    """At the longest context at which all lengths were timed."""
    steps = [(2, k, 260.0, 10.0 + k + n % 3) for k in range(3) for n in range(5)] + [(2, 0, 1030.0, 20.0)] * 5
    (curve,) = curves_of(steps, (256, 1024), 2)
    assert curve.contexts == (256,) and curve.sequences == 2
    assert lengths_of([curve], TOKENS) == {2: 2}
    assert lengths_of([CostPoints((256,), (1, 2, 3), ((10.0, 16.0, 22.0),))], TOKENS) == {1: 0}
