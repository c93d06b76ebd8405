"""What passes show about the cost of row counts; every expected value is calculated by hand or by the definition."""

from math import exp, log, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.planning.constants import (
    COST_BLOCK_SHARE,
    COST_DRIFT,
    COST_FIRST_NOISE,
    COST_NOISE,
    COST_OUTLIER,
    COST_ROW_SPREAD,
    COST_SCALE_SPREAD,
    OPTIMISM,
)
from specplug.planning.cost import CostCurve
from specplug.planning.cost_learning import CostLearning

SPREAD = 0.35


def test_nothing_is_known_before_the_first_pass() -> None:
    learning = CostLearning(4, spread=SPREAD)
    assert learning.factors.tolist() == [1.0] * 4
    assert learning.passes() == {}
    assert learning.num_passes == 0


@pytest.mark.parametrize("ratio", [0.05, 1.0, 30.0])
def test_one_pass_scales_the_whole_estimate(ratio: float) -> None:
    learning = CostLearning(16, spread=SPREAD)
    assert learning.add(1, ratio)
    assert learning.factors == pytest.approx([ratio] * 16, rel=0.06)


def test_one_pass_by_the_formula() -> None:
    """After one pass the mean is cross / (own + noise) times it, and the variance own - cross^2 / (own + noise)."""
    learning = CostLearning(8, spread=SPREAD)
    learning.add(2, 3.0)
    block = COST_BLOCK_SHARE * SPREAD
    own = COST_SCALE_SPREAD**2 + SPREAD**2 + block**2 + COST_ROW_SPREAD**2
    known = own + COST_NOISE**2 + COST_FIRST_NOISE**2
    for rows, powers in ((1, 1), (2, 0), (8, 2)):  # 2 is divisible by 2, 1 by no power of it, 8 by two more
        cross = COST_SCALE_SPREAD**2 + SPREAD**2 * exp(-((log2(rows) - 1) ** 2) / 2) + block**2 * exp(-powers)
        cross += COST_ROW_SPREAD**2 if rows == 2 else 0.0
        assert learning.factors[rows - 1] == pytest.approx(exp(log(3.0) * cross / known))
        deviation = (own - cross**2 / known) ** 0.5
        assert learning.optimistic[rows - 1] == pytest.approx(exp(-OPTIMISM * deviation))


def test_neighbours_learn_more_than_distant_row_counts() -> None:
    learning = CostLearning(32, spread=SPREAD)
    for _ in range(8):
        learning.add(1, 10.0)
        learning.add(4, 5.0)
    factors = learning.factors
    assert factors[0] == pytest.approx(10.0, rel=0.02)
    assert factors[3] == pytest.approx(5.0, rel=0.02)
    assert factors[3] < factors[11] < factors[27], "4, 12 and 28 rows"


def test_row_counts_in_blocks_of_the_same_size_learn_from_each_other() -> None:
    """What 8 and 12 rows show holds for 16 more than for 15."""
    learning = CostLearning(16, spread=SPREAD)
    for _ in range(4):
        for rows, ratio in ((1, 1.0), (7, 1.0), (8, 0.7), (11, 1.0), (12, 0.7)):
            learning.add(rows, ratio)
    factors = learning.factors
    assert factors[15] < 0.9 * factors[14]
    assert factors[3] < factors[2]


def test_uncertainty_shrinks_with_passes_and_grows_with_time() -> None:
    learning = CostLearning(8, spread=SPREAD)
    seen = []
    for _ in range(4):
        learning.add(4, 1.0)
        seen.append(learning.optimistic[3])
    assert seen == sorted(seen)
    assert learning.optimistic[3] > learning.optimistic[7], "it was not seen"
    for _ in range(1000):
        learning.add(1, 1.0)
    age = COST_DRIFT * 1000**0.5
    assert learning.optimistic[3] == pytest.approx(exp(-OPTIMISM * age), rel=0.1)


def test_a_pause_is_no_cost() -> None:
    """A pass that takes a hundred times as long moves the mean by the outlier limit over its weight at most."""
    learning = CostLearning(1, spread=SPREAD)
    for _ in range(16):
        learning.add(1, 1.0)
    learning.add(1, 100.0)
    for _ in range(32):  # until the factors are computed again
        learning.add(1, 1.0)
    assert learning.factors[0] < exp(COST_OUTLIER / 16)


def test_a_pause_in_the_first_pass_of_a_row_count_is_forgotten() -> None:
    learning = CostLearning(8, spread=SPREAD)
    for _ in range(8):
        for rows in (1, 2, 8):
            learning.add(rows, 20.0)
    learning.add(4, 400.0)
    assert learning.factors[3] < 60.0
    assert learning.factors[3] * learning.optimistic[3] < 50.0, "it may be tried again"
    for _ in range(4):
        learning.add(4, 20.0)
    learning.add(5, 20.0)  # computes the factors again
    assert learning.factors[3] == pytest.approx(20.0, rel=0.3)


def test_a_lasting_change_is_followed() -> None:
    learning = CostLearning(2, spread=SPREAD)
    for _ in range(100):
        learning.add(1, 1.0)
    for _ in range(200):
        learning.add(1, 2.0)
    assert learning.factors[0] == pytest.approx(2.0, rel=0.05)


def test_remembered_passes_make_the_estimate_certain() -> None:
    fresh, known = CostLearning(8, spread=0.1), CostLearning(8, spread=0.1, known={1: 20.0, 4: 20.0, 99: 3.0})
    assert known.factors == pytest.approx([1.0] * 8)
    assert known.num_passes == 0
    assert set(known.passes()) == {1, 4}
    assert known.optimistic[3] > 0.92
    fresh.add(1, 1.0)
    assert fresh.optimistic[3] < 0.9


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(1e-3, 1e3)), max_size=40))
def test_factors_are_always_positive_and_finite(passes: list[tuple[int, float]]) -> None:
    learning = CostLearning(12, spread=SPREAD)
    for rows, ratio in passes:
        learning.add(rows, ratio)
    assert np.isfinite(learning.factors).all() and (learning.factors > 0).all()
    assert ((learning.optimistic > 0) & (learning.optimistic <= 1)).all()


# -- a curve that learns ---------------------------------------------------------------------------------------------


def estimated(limit: int = 8) -> CostCurve:
    rows = range(1, limit + 1)
    return CostCurve([0], rows, [[float(n) for n in rows]], learning=CostLearning(limit, spread=SPREAD))


def test_a_curve_learns_the_scale_from_its_first_pass() -> None:
    curve = estimated()
    assert curve.is_unscaled and not curve.num_learned
    curve.observe(1, 0, 20.0)
    assert not curve.is_unscaled and curve.num_learned == 1
    assert curve.at(0)[0] == pytest.approx(20.0, rel=0.01)
    assert curve.at(0)[3] == pytest.approx(80.0, rel=0.1)


def test_a_curve_learns_its_shape() -> None:
    """Four rows really take 1.5 times as long as one."""
    curve = estimated()
    for _ in range(20):
        curve.observe(1, 0, 20.0)
        curve.observe(4, 0, 30.0)
    assert curve.at(0)[0] == pytest.approx(20.0, rel=0.03)
    assert curve.at(0)[3] == pytest.approx(30.0, rel=0.05)
    contexts, ms, passes = curve.learned()
    assert contexts == [0] and ms[0][3] == pytest.approx(30.0, rel=0.05)
    assert set(passes) == {1, 4}


def test_a_measured_curve_is_neither_unscaled_nor_optimistic() -> None:
    curve = CostCurve([0], [1, 2], [[10.0, 12.0]])
    assert not curve.is_unscaled and not curve.num_learned
    assert curve.optimistic(0) is None


def test_plain_decoding_is_known_only_from_recent_plain_passes() -> None:
    curve = CostCurve([0], [1, 2], [[10.0, 12.0]])
    assert not curve.shows_plain(1), "a measured curve may be out of date"
    for _ in range(4):
        curve.observe(1, 0, 10.0)
    assert curve.shows_plain(1) and not curve.shows_plain(2)
    for _ in range(129):
        curve.observe(2, 0, 12.0)
    assert not curve.shows_plain(1)
