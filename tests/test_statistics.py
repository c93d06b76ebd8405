import numpy as np
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


KINDS = [kind for _ in range(4) for kind in ("edit", "chat")]


def test_what_kinds_of_work_differ_by_does_not_widen_the_interval_of_a_given_mix() -> None:
    # edits are answered twice as fast, chats as fast as by the base, without any noise: 8 s for 6 s
    seconds = [0.5, 1.0] * 4
    within = paired_ratio([1] * 8, seconds, [1] * 8, [1.0] * 8, expanded=True, kinds=KINDS)
    over_all = paired_ratio([1] * 8, seconds, [1] * 8, [1.0] * 8, expanded=True)
    assert (within.low, within.median, within.high) == pytest.approx((8 / 6, 8 / 6, 8 / 6))
    assert over_all.low < 1.2 and over_all.high > 1.5


def test_kinds_with_too_few_prompts_are_one_stratum() -> None:
    seconds = [0.5, 1.0, 0.6, 1.1, 0.7, 0.9]
    few = paired_ratio([1] * 6, seconds, [1] * 6, [1.0] * 6, expanded=True, kinds=["a", "b", "c", "a", "b", "c"])
    assert few == paired_ratio([1] * 6, seconds, [1] * 6, [1.0] * 6, expanded=True)
    # three of a kind, and one that joins them
    joined = paired_ratio([1] * 4, seconds[:4], [1] * 4, [1.0] * 4, expanded=True, kinds=["a", "a", "a", "b"])
    assert joined == paired_ratio([1] * 4, seconds[:4], [1] * 4, [1.0] * 4, expanded=True)
    with pytest.raises(ValueError, match="no kind of their own"):
        paired_ratio([1], [1.0], [1], [1.0], groups=[0], kinds=["a"])


def test_one_noisy_kind_of_three_prompts_seldom_names_a_winner_that_saves_nothing() -> None:
    # all three noisy ones are fast in one of eight samples; the expected seconds of both are the same
    rng = np.random.default_rng(3)
    kinds = ["edit", "chat"] * 3
    above = 0
    for _ in range(300):
        seconds = np.exp(rng.normal([-0.045, 0.0] * 3, [0.3, 0.02] * 3)).tolist()  # exp(0.3**2 / 2) is exp(0.045)
        above += paired_ratio([1] * 6, seconds, [1] * 6, [1.0] * 6, expanded=True, kinds=kinds).low > 1.0
    assert above / 300 <= 0.06


def test_a_stratified_interval_holds_the_truth_as_often_as_it_says() -> None:
    # edits are 35% faster and vary by 10%, quotes 10% by 8%, chats by 3%; the truth is that of their expected seconds
    rng = np.random.default_rng(7)
    kinds = ["edit", "quote", "chat"] * 4
    means, deviations = np.array([0.3, 0.1, 0.0] * 4), np.array([0.1, 0.08, 0.03] * 4)
    truth = 12 / sum(np.exp(-means + deviations**2 / 2))
    missed = {"within": 0, "over all": 0}
    for _ in range(300):
        seconds = np.exp(rng.normal(-means, deviations)).tolist()
        for name, strata in (("within", kinds), ("over all", [])):
            interval = paired_ratio([1] * 12, seconds, [1] * 12, [1.0] * 12, expanded=True, kinds=strata)
            missed[name] += not interval.low <= truth <= interval.high
    assert 0.01 <= missed["within"] / 300 <= 0.09, "5%, and 1.3% standard deviation of 300 samples"
    assert missed["over all"] / 300 < 0.01, "so wide that it holds nearly always"
