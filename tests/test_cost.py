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
    """Contexts are told apart in blocks of 128 tokens; a block costs what its middle does."""
    return context // 128 * 128 + 64


# -- between the points ----------------------------------------------------------------------------------------------


def test_one_context_is_the_same_everywhere() -> None:
    curve = CostCurve([512], [1, 2], [[10.0, 14.0]])
    assert [curve.at(context) for context in (0, 512, 100_000)] == [[10.0, 14.0]] * 3


def test_between_rows_by_hand() -> None:
    """From 1 to 4 rows 6 ms in three steps, from 4 to 6 rows 10 ms in two."""
    curve = CostCurve([0], [1, 4, 6], [[10.0, 16.0, 26.0]])
    assert curve.limit == 6
    assert curve.at(0) == pytest.approx([10.0, 12.0, 14.0, 16.0, 21.0, 26.0])


def test_a_tooth_is_kept() -> None:
    curve = CostCurve([0], [1, 6, 8], [[10.0, 30.0, 20.0]])
    assert curve.at(0)[5:] == pytest.approx([30.0, 25.0, 20.0])


@pytest.mark.parametrize("context", [0, 63, 200, 1088, 2000, 2112])
def test_between_contexts(context: int) -> None:
    """10 ms at 64 tokens and 14 ms at 2112: 4 ms in 2048 tokens."""
    curve = CostCurve([64, 2112], [1], [[10.0], [14.0]])
    assert curve.at(context) == pytest.approx([10.0 + 4.0 * (middle(context) - 64) / 2048])


def test_below_the_first_context_is_the_first() -> None:
    assert CostCurve([1000, 2000], [1], [[10.0], [14.0]]).at(0) == [10.0]


@pytest.mark.parametrize("context", [3072, 4000, 32000])
def test_beyond_the_last_context_the_last_slope_goes_on(context: int) -> None:
    """1 ms per 1024 tokens at first, then 4 ms per 1024 tokens from 2048 on."""
    curve = CostCurve([0, 2048, 3072], [1, 2], [[10.0, 20.0], [12.0, 22.0], [16.0, 22.0]])
    assert curve.at(context) == pytest.approx([16.0 + 4.0 * (middle(context) - 3072) / 1024, 22.0])


@given(
    st.lists(st.floats(1.0, 100.0), min_size=2, max_size=2),
    st.lists(st.integers(0, 20_000), min_size=2, max_size=2).map(sorted),
)
def test_a_fuller_cache_never_costs_less(ms: list[float], contexts: list[int]) -> None:
    """Even where the second measurement came out below the first."""
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


# -- points that are no curve ----------------------------------------------------------------------------------------


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
def test_one_value_per_point(ms: list[list[float]]) -> None:
    with pytest.raises(UsageError, match="one value per context and row count") as caught:
        CostCurve([0], [1, 2], ms)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_values_are_positive_numbers(value: float) -> None:
    with pytest.raises(UsageError, match="positive number") as caught:
        CostCurve([0], [1, 2], [[1.0, value]])
    assert "\n" not in str(caught.value)


# -- while running ---------------------------------------------------------------------------------------------------


def test_one_refresh_of_slow_passes_by_hand() -> None:
    """What a second row adds keeps its price."""
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
def test_the_curve_comes_to_what_passes_take(true_ms: float) -> None:
    """10 to 30 ms is 275 steps of 0.4%. It may overshoot by what was seen before a refresh, and no more."""
    curve = CostCurve([0], [1], [[10.0]])
    feed(curve, 1, [true_ms] * 1000)
    assert curve.at(0)[0] == pytest.approx(true_ms, rel=(1 + ONE_ROW_STEP) ** CURVE_REFRESH - 1)


def test_the_curve_comes_to_the_median() -> None:
    """A quarter of the passes is ten times slower: the median is 12, the mean 39."""
    passes = np.random.default_rng(0).normal(12.0, 1.0, 4000)
    passes[np.random.default_rng(1).random(4000) < 0.25] *= 10.0
    curve = CostCurve([0], [1], [[10.0]])
    feed(curve, 1, passes.tolist())
    assert curve.at(0)[0] == pytest.approx(float(np.median(passes)), rel=0.1)


def test_passes_that_take_what_the_curve_says_leave_it_alone() -> None:
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
def test_arithmetic_and_memory_change_apart(one: float, further: float) -> None:
    """The curve of another day: passes of 1, 3 and 7 rows, as a planner mixes them, put every row count right."""
    raw = [10.0 + 2.0 * n for n in range(16)]
    true = [10.0 * one + 2.0 * n * further for n in range(16)]
    curve = CostCurve([0], range(1, 17), [raw])
    for _ in range(300):
        for rows in (1, 1, 3, 7):
            curve.observe(rows, 0, true[rows - 1])
    assert curve.at(0) == pytest.approx(true, rel=0.05)


def test_the_first_passes_of_several_rows_count_most() -> None:
    """Rows that cost twice as much are known to cost half as much again after 8 of them."""
    curve = CostCurve([0], range(1, 9), [[10.0 + 2.0 * n for n in range(8)]])
    for _ in range(8):
        curve.observe(1, 0, 10.0)
        curve.observe(4, 0, 22.0)
    assert curve.at(0)[7] - curve.at(0)[0] > 1.25 * 14.0


def test_rows_as_cheap_as_one_stay_so() -> None:
    """Nothing to scale: one row count's own correction, and the whole's, are all there is."""
    curve = CostCurve([0], range(1, 5), [[10.0] * 4])
    feed(curve, 3, [12.0] * 40 * CURVE_REFRESH)
    assert curve.at(0)[2] == pytest.approx(12.0, rel=0.02)


def test_a_price_that_nothing_confirms_is_forgotten() -> None:
    """A spell in which seven more rows cost 10.5 instead of 7 ms, then none but single rows."""
    curve = CostCurve([0], range(1, 9), [[10.0 + n for n in range(8)]])
    feed(curve, 8, [20.5] * 2 * CURVE_REFRESH)
    dear = curve.at(0)[7] - curve.at(0)[0]
    feed(curve, 1, [10.0] * round(3 / EXTRA_ROWS_RETURN))
    assert dear > 9.5
    assert curve.at(0)[7] - curve.at(0)[0] < 8.0


def passes_until_plain_is_due(curve: CostCurve) -> int:
    for passes in range(1000):
        if curve.plain_due:
            return passes
        curve.observe(2, 0, 12.0)
    return 1000


def test_a_plain_pass_is_due_when_none_was_seen_for_long() -> None:
    """After one that took about what was thought, not again for as long; after a surprise, soon, then ever later."""
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
def test_plain_passes_that_change_are_found_out_while_drafts_run(true_ms: float) -> None:
    """Thought to be 15 ms. A fifth is made up of steps of 4% after 64 and after 16 passes, and of 1.6% after 4 each."""
    curve = CostCurve([0], [1, 2, 3, 4, 5], [[15.0, 17.0, 19.0, 21.0, 23.0]])
    plain = 0
    for _ in range(PLAIN_INTERVAL + 100):
        rows = 1 if curve.plain_due else 5
        plain += rows == 1
        curve.observe(rows, 0, true_ms if rows == 1 else 23.0)
    assert curve.at(0)[0] == pytest.approx(true_ms, rel=0.06)
    assert curve.at(0)[4] == pytest.approx(23.0, rel=0.06)
    assert plain < 20


def test_a_pause_in_a_rare_plain_pass_moves_the_curve_little() -> None:
    curve = CostCurve([0], [1, 2], [[10.0, 12.0]])
    passes = passes_until_plain_is_due(curve)
    before = curve.at(0)[0]
    curve.observe(1, 0, 1e9)
    feed(curve, 2, [0.0] * (CURVE_REFRESH - 1 - passes % CURVE_REFRESH))  # the next corrected curve
    assert curve.at(0)[0] <= before * (1 + MAX_RARE_PLAIN_STEP)


@pytest.mark.parametrize("off", [0.02, 0.05])
def test_rare_plain_passes_leave_a_right_price_alone(off: float) -> None:
    """Every second one is so much slower or faster, passes with guesses take what was thought."""
    curve = CostCurve([0], [1, 2], [[10.0, 12.0]])
    seen = []
    for turn in range(200):
        passes_until_plain_is_due(curve)
        curve.observe(1, 0, 10.0 * (1 + off * (-1) ** turn))
        seen.append(curve.at(0)[0])
    assert seen == pytest.approx([10.0] * 200, rel=off)


def test_a_difference_of_rounding_is_none() -> None:
    """(15.37 + 1.13) - 1.13 is not 15.37, and replays would have their price swing for it."""
    curve = CostCurve([0], [1, 2], [[15.37, 20.0]], change_ms=1.13)
    for _ in range(20):
        feed(curve, 2, [20.0] * 2 * PLAIN_INTERVAL)
        curve.observe(1, 0, 15.37 + 1.13, changed=True)
    assert curve.at(0) == [15.37, 20.0]


def test_rows_beyond_the_curve_teach_nothing() -> None:
    curve = CostCurve([0], [1, 2], [[10.0, 12.0]])
    feed(curve, 3, [1000.0] * 2 * CURVE_REFRESH)
    assert curve.at(0) == [10.0, 12.0]


# -- what perfect drafts could give ----------------------------------------------------------------------------------


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


def test_oracle_speedup_is_the_contexts() -> None:
    """Empty cache: 2 x 10 / 10. At 1024 + 64 tokens (17 blocks): 2 x 17 / 34."""
    curve = CostCurve([64, 1088], [1, 2], [[10.0, 10.0], [17.0, 34.0]])
    assert oracle_speedup(curve, 0) == pytest.approx(2.0)
    assert oracle_speedup(curve, 1088) == pytest.approx(1.0)


def test_what_a_change_of_shape_costs_is_not_taken_for_the_pass() -> None:
    """Passes of 10 ms, and 2 more after one of other rows: the curve stays at 10."""
    curve = CostCurve([0], [1, 4], [[10.0, 20.0]], change_ms=2.0)
    for _ in range(300):
        curve.observe(1, 0, 12.0, changed=True)
        curve.observe(1, 0, 10.0, changed=False)
    assert curve.at(0)[0] == pytest.approx(10.0, rel=0.01)
    plain = CostCurve([0], [1, 4], [[10.0, 20.0]])
    for _ in range(300):
        plain.observe(1, 0, 12.0, changed=True)
    assert plain.at(0)[0] == pytest.approx(12.0, rel=0.01)
