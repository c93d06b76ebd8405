"""The cost curves of an engine: what they start from, what they keep, and what they do with damaged files."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp")

from specplug.engines.llama_cpp.cost_estimate import estimated_points
from specplug.engines.llama_cpp.engine_settings import can_offload
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.pass_costs import PassCosts, remember
from specplug.planning.cost import CostCurve
from specplug.profile import CostPoints, Runtime

pytestmark = pytest.mark.llama

RUNTIME = Runtime(threads=2, flash_attention=True, kv_type="bf16")
LIMIT = 8
MEASURED = CostPoints((0,), tuple(range(1, LIMIT + 1)), (tuple(10.0 + rows for rows in range(LIMIT)),))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "specplug" / "cost"


def costs(model: Model, runtime: Runtime = RUNTIME, measured: CostPoints | None = None) -> PassCosts:
    return PassCosts(model, runtime, LIMIT, measured=measured)


def run(curve: CostCurve, ms: dict[int, float], times: int = 12) -> None:
    for _ in range(times):
        for rows, value in ms.items():
            curve.observe(rows, 0, value)


def test_an_unknown_model_starts_from_the_estimate(q8_0: Model) -> None:
    curve = costs(q8_0).curve(2)
    estimate = estimated_points(q8_0, RUNTIME, LIMIT)
    assert curve.is_unscaled
    assert curve.at(0) == pytest.approx(CostCurve(estimate.contexts, estimate.rows, estimate.ms).at(0))
    assert estimate.ms[0][0] == 1.0 and estimate.ms[0][7] < 1.15 * estimate.ms[0][6], "kernels compute blocks of rows"
    assert estimate.ms[1][0] > 1.5, "attention over 4096 tokens takes as long as the weights of a small model"


def test_the_estimate_depends_on_format_and_threads(q8_0: Model, f32: Model) -> None:
    def four_rows(model: Model, threads: int, gpu_layers: int = 0) -> float:
        return estimated_points(model, Runtime(threads=threads, gpu_layers=gpu_layers), LIMIT).ms[0][3]

    assert four_rows(f32, 2) < four_rows(q8_0, 2) < four_rows(q8_0, 1)
    if not can_offload():
        assert four_rows(q8_0, 2, gpu_layers=-1) == four_rows(q8_0, 2), "this build computes no layers on a GPU"


def test_what_was_learned_is_kept_for_the_same_model_and_settings(q8_0: Model) -> None:
    first = costs(q8_0)
    run(first.curve(2), {1: 20.0, 4: 30.0})
    first.keep()
    again = costs(q8_0, replace(RUNTIME, context=8192, batch=64)).curve(2)
    assert not again.is_unscaled
    assert again.at(0)[0] == pytest.approx(20.0, rel=0.05)
    assert again.at(0)[3] == pytest.approx(30.0, rel=0.05)
    assert costs(q8_0, replace(RUNTIME, flash_attention=False)).curve(2).is_unscaled, "another kernel"
    assert costs(q8_0).curve(1).is_unscaled, "other threads"
    assert PassCosts(q8_0, RUNTIME, LIMIT, padded=True).curve(2).is_unscaled, "padded passes"


def test_row_counts_that_never_ran_stay_as_uncertain_as_they_were(q8_0: Model) -> None:
    first = costs(q8_0)
    run(first.curve(2), {1: 20.0})
    first.keep()
    before, after = first.curve(2), costs(q8_0).curve(2)
    shares = [
        [low / ms for low, ms in zip(curve.optimistic(0) or [], curve.at(0), strict=True)] for curve in (before, after)
    ]
    assert shares[1][7] == pytest.approx(shares[0][7], abs=0.02)
    assert shares[1][7] < 0.75


def test_nothing_is_kept_where_no_pass_ran(q8_0: Model, empty_cache: Path) -> None:
    one = costs(q8_0)
    one.curve(2)
    one.keep()
    assert not empty_cache.exists()


def test_a_measured_curve_is_used_as_it_is_for_its_threads(q8_0: Model, empty_cache: Path) -> None:
    one = costs(q8_0, measured=MEASURED)
    assert one.curve(2).at(0) == pytest.approx(MEASURED.ms[0])
    assert one.curve(2).optimistic(0) is None
    assert one.curve(1).optimistic(0) is not None, "with other threads it is an estimate"
    run(one.curve(2), {1: 12.0})
    one.keep()
    assert not empty_cache.exists()


def test_a_curve_of_another_model_in_the_same_format_gives_its_shape(q8_0: Model, formats: dict[str, Path]) -> None:
    """The same weights under other settings of the cache stand for another model."""
    other = costs(q8_0, replace(RUNTIME, kv_type="f16"))
    flat = {rows: 20.0 + rows for rows in (1, 2, 4, 8)}
    run(other.curve(2), flat)
    other.keep()
    curve = costs(q8_0).curve(2)
    assert curve.is_unscaled
    assert curve.at(0)[7] / curve.at(0)[0] == pytest.approx(28 / 21, rel=0.1)


def test_one_row_alone_says_nothing_about_the_shape(q8_0: Model) -> None:
    other = costs(q8_0, replace(RUNTIME, kv_type="f16"))
    run(other.curve(2), {1: 20.0})
    other.keep()
    estimate = estimated_points(q8_0, RUNTIME, LIMIT)
    assert costs(q8_0).curve(2).at(0)[7] == pytest.approx(estimate.ms[0][7], rel=0.05)


def test_a_measured_curve_can_be_kept_for_later(q8_0: Model) -> None:
    remember(q8_0, RUNTIME, MEASURED)
    curve = costs(q8_0).curve(2)
    assert not curve.is_unscaled
    assert curve.at(0) == pytest.approx(MEASURED.ms[0], rel=1e-6)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 5}', '{"schema": 4, "contexts": [0]}', "\0"])
def test_damaged_files_are_ignored(content: str, q8_0: Model, empty_cache: Path) -> None:
    remember(q8_0, RUNTIME, MEASURED)
    (path,) = empty_cache.glob("*.json")
    path.write_text(content)
    assert costs(q8_0).curve(2).is_unscaled


@pytest.mark.parametrize(("key", "value"), [("rows", [2, 1]), ("ms", [[-1.0] * 8]), ("spread", 0.0), ("passes", [])])
def test_impossible_curves_are_ignored(key: str, value: object, q8_0: Model, empty_cache: Path) -> None:
    import json

    remember(q8_0, RUNTIME, MEASURED)
    (path,) = empty_cache.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert costs(q8_0).curve(2).is_unscaled


def test_forgetting_starts_again(q8_0: Model) -> None:
    one = costs(q8_0)
    run(one.curve(2), {1: 20.0})
    one.forget()
    assert one.curve(2).is_unscaled


def test_a_padded_pass_of_one_row_takes_as_long_as_two(q8_0: Model) -> None:
    curve = PassCosts(q8_0, RUNTIME, LIMIT, measured=MEASURED, padded=True).curve(2)
    assert curve.at(0)[0] == curve.at(0)[1] == 11.0
