import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.bench.statistics import Interval, paired_ratio


def test_a_constant_ratio_has_no_width() -> None:
    """Every prompt takes half the seconds."""
    assert paired_ratio([10, 40, 25], [1.0, 8.0, 2.0], [10, 40, 25], [2.0, 16.0, 4.0]) == Interval(2.0, 2.0, 2.0)


def test_an_arm_against_itself_is_one() -> None:
    assert paired_ratio([7, 9], [0.3, 1.1], [7, 9], [0.3, 1.1]) == Interval(1.0, 1.0, 1.0)


def test_answers_of_other_lengths_count_by_their_speed() -> None:
    """Twice the tokens in the same seconds, and half the tokens in a quarter of the seconds, are both 2."""
    assert paired_ratio([20], [1.0], [10], [1.0]) == Interval(2.0, 2.0, 2.0)
    assert paired_ratio([5], [0.25], [10], [1.0]) == Interval(2.0, 2.0, 2.0)


def test_long_answers_count_by_their_cost() -> None:
    """A resample draws two of two prompts: (a, a) has the ratio 3 and (b, b) the ratio 1, each in one of four cases;
    the other two cases have 1010 tokens in 1000 / 3 + 10 s against 1010 s. The interval spans the two extremes, and the
    median is the middle case."""
    found = paired_ratio([1000, 10], [1000 / 3, 10.0], [1000, 10], [1000.0, 10.0])
    assert found.median == pytest.approx(1010 / (1000 / 3 + 10))
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(3.0))


def test_one_slow_prompt_of_forty_is_in_the_interval() -> None:
    """All prompts have the ratio 2 but one, which has 1. It is not drawn in (39/40)^40 = 36% of the resamples, and
    drawn four times or more in 2%."""
    found = paired_ratio([10] * 40, [1.0] * 39 + [2.0], [10] * 40, [2.0] * 40)
    assert found.high == 2.0
    assert found.median == pytest.approx(80 / 41)
    assert found.low == pytest.approx(80 / 43)


items = st.tuples(st.integers(1, 500), st.floats(0.01, 60.0), st.integers(1, 500), st.floats(0.01, 60.0))


@given(st.lists(items, min_size=1, max_size=10))
def test_the_interval_holds_the_median_and_lies_between_the_items(lines: list[tuple[int, float, int, float]]) -> None:
    columns = [list(column) for column in zip(*lines, strict=True)]
    found = paired_ratio(*columns)  # type: ignore[arg-type]
    assert found.low <= found.median <= found.high
    assert found == paired_ratio(*columns)  # type: ignore[arg-type]
    speeds = [tokens / seconds for tokens, seconds, _, _ in lines]
    bases = [tokens / seconds for _, _, tokens, seconds in lines]
    slack = 1 + 1e-9
    assert min(speeds) / max(bases) <= found.low * slack
    assert found.high <= max(speeds) / min(bases) * slack


@given(st.lists(items, min_size=1, max_size=6), st.sampled_from([0.25, 2.0, 8.0]))
def test_faster_by_a_factor_is_a_ratio_larger_by_it(lines: list[tuple[int, float, int, float]], factor: float) -> None:
    tokens, seconds, base_tokens, base_seconds = ([line[i] for line in lines] for i in range(4))
    one = paired_ratio(tokens, seconds, base_tokens, base_seconds)
    two = paired_ratio(tokens, [s / factor for s in seconds], base_tokens, base_seconds)
    for a, b in zip((one.median, one.low, one.high), (two.median, two.low, two.high), strict=True):
        assert b == pytest.approx(a * factor)


def test_an_answer_of_one_token_does_not_spoil_the_figures() -> None:
    """Without its first token it has 0 tokens in 0 seconds; one of four resamples would draw it twice."""
    assert paired_ratio([0, 10], [0.0, 1.0], [0, 10], [0.0, 2.0]) == Interval(2.0, 2.0, 2.0)
