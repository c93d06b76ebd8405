from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.errors import UsageError
from specplug.planning.constants import (
    CURVE_REFRESH,
    EARLY_EXTRA_ROWS_STEP,
    EXTRA_ROWS_RETURN,
    MAX_RARE_PLAIN_STEP,
    MIN_PLAIN_INTERVAL,
    ONE_ROW_STEP,
    PLAIN_INTERVAL,
    ROW_COUNT_STEP,
)
from specplug.planning.cost import CostCurve, oracle_speedup


def feed(curve: CostCurve, rows: int, ms: Sequence[float], context: int = 0) -> None:
    for value in ms:
        curve.observe(rows, context, value)


def middle(context: int) -> int:
    """Contexts are distinguished in blocks of 128 tokens; a block costs as much as its middle."""
    return context // 128 * 128 + 64


# -- between the points ----------------------------------------------------------------------------------------------


def test_a_curve_of_one_context_is_the_same_everywhere() -> None:
    curve = CostCurve([512], [1, 2], [[10.0, 14.0]])
    assert [curve.at(context) for context in (0, 512, 100_000)] == [[10.0, 14.0]] * 3


def test_between_rows_by_hand() -> None:
    """From 1 to 4 rows 6 ms in three steps, from 4 to 6 rows 10 ms in two."""
    curve = CostCurve([0], [1, 4, 6], [[10.0, 16.0, 26.0]])
    assert curve.limit == 6
    assert curve.at(0) == pytest.approx([10.0, 12.0, 14.0, 16.0, 21.0, 26.0])


def test_a_non_monotonic_curve_is_kept() -> None:
    curve = CostCurve([0], [1, 6, 8], [[10.0, 30.0, 20.0]])
    assert curve.at(0)[5:] == pytest.approx([30.0, 25.0, 20.0])


@pytest.mark.parametrize("context", [0, 63, 200, 1088, 2000, 2112])
def test_between_contexts(context: int) -> None:
    """10 ms at 64 tokens and 14 ms at 2112: 4 ms in 2048 tokens."""
    curve = CostCurve([64, 2112], [1], [[10.0], [14.0]])
    assert curve.at(context) == pytest.approx([10.0 + 4.0 * (middle(context) - 64) / 2048])


def test_below_the_first_context_its_costs_are_used() -> None:
    assert CostCurve([1000, 2000], [1], [[10.0], [14.0]]).at(0) == [10.0]


@pytest.mark.parametrize("context", [3072, 4000, 32000])
def test_beyond_the_last_context_the_last_slope_continues(context: int) -> None:
    """1 ms per 1024 tokens at first, then 4 ms per 1024 tokens from 2048 on."""
    curve = CostCurve([0, 2048, 3072], [1, 2], [[10.0, 20.0], [12.0, 22.0], [16.0, 22.0]])
    assert curve.at(context) == pytest.approx([16.0 + 4.0 * (middle(context) - 3072) / 1024, 22.0])


@given(
    st.lists(st.floats(1.0, 100.0), min_size=2, max_size=2),
    st.lists(st.integers(0, 20_000), min_size=2, max_size=2).map(sorted),
)
def test_a_fuller_cache_never_costs_less(ms: list[float], contexts: list[int]) -> None:
    """Even if the second measurement was below the first."""
    curve = CostCurve([0, 4096], [1], [[ms[0]], [ms[1]]])
    less, more = (curve.at(context)[0] for context in contexts)
    assert 0.0 < less <= more * (1 + 1e-12)


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=5, unique=True).map(sorted),
    st.lists(st.floats(0.1, 1000.0), min_size=6, max_size=6),
)
def test_every_measured_point_is_on_the_curve(rows: list[int], ms: list[float]) -> None:
    rows = [1, *rows]
    line = CostCurve([0], rows, [ms[: len(rows)]]).at(0)
    assert len(line) == rows[-1]
    assert [line[n - 1] for n in rows] == pytest.approx(ms[: len(rows)])


# -- points that do not form a curve ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contexts", "rows", "ms"),
    [
        ([], [1], []),
        ([0], [], [[]]),
        ([0], [2, 3], [[1.0, 2.0]]),
        ([0], [1, 3, 2], [[1.0, 2.0, 3.0]]),
        ([0], [1, 2, 2], [[1.0, 2.0, 3.0]]),
        ([512, 0], [1], [[1.0], [2.0]]),
        ([512, 512], [1], [[1.0], [2.0]]),
    ],
)
def test_points_must_ascend_from_one_row(contexts: list[int], rows: list[int], ms: list[list[float]]) -> None:
    with pytest.raises(UsageError, match="must ascend") as caught:
        CostCurve(contexts, rows, ms)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ms", [[[1.0]], [[1.0, 2.0, 3.0]], [[1.0, 2.0], [1.0, 2.0]], [[]]])
def test_there_must_be_one_value_per_point(ms: list[list[float]]) -> None:
    with pytest.raises(UsageError, match="one value per context and row count") as caught:
        CostCurve([0], [1, 2], ms)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_values_must_be_positive_numbers(value: float) -> None:
    with pytest.raises(UsageError, match="positive number") as caught:
        CostCurve([0], [1, 2], [[1.0, value]])
    assert "\n" not in str(caught.value)


# -- while running ---------------------------------------------------------------------------------------------------


def test_one_refresh_of_slow_passes_by_hand() -> None:
    """What a second row adds does not change."""
    curve = CostCurve([0], [1, 2], [[10.0, 12.0]])
    feed(curve, 1, [15.0] * CURVE_REFRESH)
    one = 10.0 * (1 + ONE_ROW_STEP) ** CURVE_REFRESH
    assert curve.at(0) == pytest.approx([one, one + 2.0])


def test_a_pause_moves_the_curve_no_further_than_a_slow_pass() -> None:
    slow, pause = (CostCurve([0], [1], [[10.0]]) for _ in range(2))
    feed(slow, 1, [10.1] + [9.0] * (CURVE_REFRESH - 1))
    feed(pause, 1, [1e9] + [9.0] * (CURVE_REFRESH - 1))
    assert pause.at(0) == slow.at(0)
    assert pause.at(0)[0] < 10.0


@pytest.mark.parametrize("true_ms", [4.0, 9.0, 10.5, 30.0])
def test_the_curve_converges_to_the_times_of_passes(true_ms: float) -> None:
    """From 10 to 30 ms it takes 275 steps of 0.4%. It may overshoot by the observations before one refresh."""
    curve = CostCurve([0], [1], [[10.0]])
    feed(curve, 1, [true_ms] * 1000)
    assert curve.at(0)[0] == pytest.approx(true_ms, rel=(1 + ONE_ROW_STEP) ** CURVE_REFRESH - 1)


def test_the_curve_converges_to_the_median() -> None:
    """A quarter of the passes is ten times as slow: the median is 12 ms, the mean 39 ms."""
    passes = np.random.default_rng(0).normal(12.0, 1.0, 4000)
    passes[np.random.default_rng(1).random(4000) < 0.25] *= 10.0
    curve = CostCurve([0], [1], [[10.0]])
    feed(curve, 1, passes.tolist())
    assert curve.at(0)[0] == pytest.approx(float(np.median(passes)), rel=0.1)


def test_passes_that_take_the_predicted_time_do_not_change_the_curve() -> None:
    curve = CostCurve([0], [1], [[10.0]])
    seen = []
    for _ in range(50):
        feed(curve, 1, [10.0] * CURVE_REFRESH)
        seen += curve.at(0)
    assert seen == pytest.approx([10.0] * 50, rel=0.02)


def test_a_fuller_cache_never_costs_less_with_three_contexts() -> None:
    curve = CostCurve([0, 1024, 2048], [1], [[10.0], [8.0], [9.0]])
    line = [curve.at(context)[0] for context in range(0, 4096, 128)]
    assert line == sorted(line)


def test_a_correction_holds_at_every_context() -> None:
    curve = CostCurve([0, 1024], [1, 2, 3], [[10.0, 12.0, 14.0], [20.0, 24.0, 28.0]])
    first, second, third = curve.at(5000)
    feed(curve, 2, [1.0] * CURVE_REFRESH, context=100)
    small = (1 - ROW_COUNT_STEP) ** CURVE_REFRESH
    early = EARLY_EXTRA_ROWS_STEP
    extra = float(np.prod([1 - max(early / 10, early / n) for n in range(1, CURVE_REFRESH + 1)]))
    one = first * small
    expected = [one, (one + (second - first) * extra) * small, one + (third - first) * extra]
    assert curve.at(5000) == pytest.approx(expected)


@pytest.mark.parametrize(("one", "further"), [(1.0, 1.4), (1.3, 0.7), (0.8, 2.0), (1.0, 1.0)])
def test_the_first_row_and_further_rows_are_corrected_apart(one: float, further: float) -> None:
    """Passes of 1, 3 and 7 rows, as a planner mixes them, correct a curve measured in other conditions everywhere."""
    raw = [10.0 + 2.0 * n for n in range(16)]
    true = [10.0 * one + 2.0 * n * further for n in range(16)]
    curve = CostCurve([0], range(1, 17), [raw])
    for _ in range(300):
        for rows in (1, 1, 3, 7):
            curve.observe(rows, 0, true[rows - 1])
    assert curve.at(0) == pytest.approx(true, rel=0.05)


def test_the_first_passes_of_several_rows_correct_most() -> None:
    """Rows cost twice as much as predicted; after 8 passes the prediction has risen by more than a quarter."""
    curve = CostCurve([0], range(1, 9), [[10.0 + 2.0 * n for n in range(8)]])
    for _ in range(8):
        curve.observe(1, 0, 10.0)
        curve.observe(4, 0, 22.0)
    assert curve.at(0)[7] - curve.at(0)[0] > 1.25 * 14.0


def test_further_rows_that_cost_nothing_are_corrected_by_row_count() -> None:
    """There is no cost of further rows to scale: the corrections of T(1) and of this row count do it alone."""
    curve = CostCurve([0], range(1, 5), [[10.0] * 4])
    feed(curve, 3, [12.0] * 40 * CURVE_REFRESH)
    assert curve.at(0)[2] == pytest.approx(12.0, rel=0.02)


def test_a_cost_of_further_rows_that_nothing_confirms_returns_to_the_measured_one() -> None:
    """For a while seven further rows cost 10.5 instead of 7 ms; then there are only passes of one row."""
    curve = CostCurve([0], range(1, 9), [[10.0 + n for n in range(8)]])
    feed(curve, 8, [20.5] * 2 * CURVE_REFRESH)
    risen = curve.at(0)[7] - curve.at(0)[0]
    feed(curve, 1, [10.0] * round(3 / EXTRA_ROWS_RETURN))
    assert risen > 9.5
    assert curve.at(0)[7] - curve.at(0)[0] < 8.0


def passes_until_plain_is_due(curve: CostCurve) -> int:
    for passes in range(1000):
        if curve.plain_due:
            return passes
        curve.observe(2, 0, 12.0)
    return 1000


def test_a_plain_pass_is_due_after_many_passes_without_one() -> None:
    """After a plain pass of about the predicted time the interval stays; after a surprise it falls and grows again."""
    curve = CostCurve([0], [1, 2], [[10.0, 12.0]])
    assert passes_until_plain_is_due(curve) == PLAIN_INTERVAL
    curve.observe(1, 0, 10.5)
    assert passes_until_plain_is_due(curve) == PLAIN_INTERVAL
    curve.observe(1, 0, 8.0)
    waits = []
    for _ in range(6):
        waits.append(passes_until_plain_is_due(curve))
        curve.observe(1, 0, curve.at(0)[0])
    assert waits == [16, 32, 64, 64, 64, 64]
    for _ in range(3):
        curve.observe(1, 0, 20.0)
    assert passes_until_plain_is_due(curve) == MIN_PLAIN_INTERVAL


@pytest.mark.parametrize("true_ms", [12.0, 18.0])
def test_a_change_of_plain_passes_is_found_while_drafting(true_ms: float) -> None:
    """T(1) is believed to be 15 ms. A fifth takes steps of 4% after 64 and 16 passes, then of 1.6% after 4 each."""
    curve = CostCurve([0], [1, 2, 3, 4, 5], [[15.0, 17.0, 19.0, 21.0, 23.0]])
    plain = 0
    for _ in range(PLAIN_INTERVAL + 100):
        rows = 1 if curve.plain_due else 5
        plain += rows == 1
        curve.observe(rows, 0, true_ms if rows == 1 else 23.0)
    assert curve.at(0)[0] == pytest.approx(true_ms, rel=0.06)
    assert curve.at(0)[4] == pytest.approx(23.0, rel=0.06)
    assert plain < 20


def test_a_pause_during_a_rare_plain_pass_moves_the_curve_little() -> None:
    curve = CostCurve([0], [1, 2], [[10.0, 12.0]])
    passes = passes_until_plain_is_due(curve)
    before = curve.at(0)[0]
    curve.observe(1, 0, 1e9)
    feed(curve, 2, [0.0] * (CURVE_REFRESH - 1 - passes % CURVE_REFRESH))  # the next corrected curve
    assert curve.at(0)[0] <= before * (1 + MAX_RARE_PLAIN_STEP)


@pytest.mark.parametrize("off", [0.02, 0.05])
def test_rare_plain_passes_do_not_change_a_correct_cost(off: float) -> None:
    """Plain passes are alternately slower and faster by `off`; passes with drafts take the predicted time."""
    curve = CostCurve([0], [1, 2], [[10.0, 12.0]])
    seen = []
    for turn in range(200):
        passes_until_plain_is_due(curve)
        curve.observe(1, 0, 10.0 * (1 + off * (-1) ** turn))
        seen.append(curve.at(0)[0])
    assert seen == pytest.approx([10.0] * 200, rel=off)


def test_a_difference_by_floating_point_rounding_is_ignored() -> None:
    """(15.37 + 1.13) - 1.13 is not 15.37, which would make the costs of a replay oscillate."""
    curve = CostCurve([0], [1, 2], [[15.37, 20.0]], change_ms=1.13)
    for _ in range(20):
        feed(curve, 2, [20.0] * 2 * PLAIN_INTERVAL)
        curve.observe(1, 0, 15.37 + 1.13, changed=True)
    assert curve.at(0) == [15.37, 20.0]


def test_passes_beyond_the_curve_are_ignored() -> None:
    curve = CostCurve([0], [1, 2], [[10.0, 12.0]])
    feed(curve, 3, [1000.0] * 2 * CURVE_REFRESH)
    assert curve.at(0) == [10.0, 12.0]


# -- the speedup of perfect drafts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ms", "speedup"),
    [
        ([10.0], 1.0),
        ([10.0, 10.0, 10.0], 3.0),
        ([10.0, 20.0, 30.0], 1.0),
        ([10.0, 30.0, 60.0], 1.0),
        ([10.0, 16.0, 20.0, 50.0], 1.5),  # 1, 1.25, 1.5, 0.8
    ],
)
def test_oracle_speedup_by_hand(ms: list[float], speedup: float) -> None:
    assert oracle_speedup(CostCurve([0], range(1, len(ms) + 1), [ms]), 0) == pytest.approx(speedup)


def test_oracle_speedup_depends_on_the_context() -> None:
    """With an empty cache 2 x 10 / 10, at 1024 + 64 tokens (17 blocks) 2 x 17 / 34."""
    curve = CostCurve([64, 1088], [1, 2], [[10.0, 10.0], [17.0, 34.0]])
    assert oracle_speedup(curve, 0) == pytest.approx(2.0)
    assert oracle_speedup(curve, 1088) == pytest.approx(1.0)


def test_the_cost_of_changing_the_row_count_is_not_attributed_to_the_pass() -> None:
    """Passes take 10 ms, and 2 ms more after one with another row count: the curve stays at 10 ms."""
    curve = CostCurve([0], [1, 4], [[10.0, 20.0]], change_ms=2.0)
    for _ in range(300):
        curve.observe(1, 0, 12.0, changed=True)
        curve.observe(1, 0, 10.0, changed=False)
    assert curve.at(0)[0] == pytest.approx(10.0, rel=0.01)
    plain = CostCurve([0], [1, 4], [[10.0, 20.0]])
    for _ in range(300):
        plain.observe(1, 0, 12.0, changed=True)
    assert plain.at(0)[0] == pytest.approx(12.0, rel=0.01)
