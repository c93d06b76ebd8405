"""Replay with one plan for a batch, checked against arithmetic by hand; and a tune of an engine that plans this way."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_tune_replay import given_answer, setting, toy_trace
from toy_subject import ToySubject

from specplug import profile as profiles
from specplug.bench.workloads import Prompt
from specplug.profile import CostPoints, Profile, VllmSettings
from specplug.registry import ProposerSpec
from specplug.testing import ToyTarget
from specplug.tune.candidates import BUILTIN, PLAIN, grid
from specplug.tune.expense import Expense, Line
from specplug.tune.prediction import Costs
from specplug.tune.replay import replay
from specplug.tune.replay_batch import replayed_as
from specplug.tune.session import tune
from specplug.tune.trace import Trace
from specplug.tune.tune_request import Request


def costs(*curves: tuple[int, tuple[float, ...]], expense: Expense | None = None) -> Costs:
    """Each curve is a number of sequences and the milliseconds of 1, 2, … rows; the last curve is that of the level."""
    batch = tuple(CostPoints((0,), tuple(range(1, len(ms) + 1)), (ms,), size) for size, ms in curves)
    return Costs(batch[-1], expense or Expense(), batch)


FLAT = costs((1, (10.0,) * 64))


def test_a_repeated_prompt_by_hand() -> None:
    """As for single sequences, there are two passes of 3 and 2 rows, which emit 3 and 2 tokens."""
    trace = Trace({"max_tokens": 6}, (given_answer([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),))
    chain = setting("ngram", nodes=2, trees=False)
    found = replay(chain, trace, costs((1, (10.0, 11.0, 13.0, 99.0)))).total
    assert (found.tokens, found.steps, found.drafted, found.accepted) == (5, 2, 3, 3)
    assert found.ms == pytest.approx(13.0 + 11.0) and found.plain_ms == pytest.approx(50.0)
    assert found.offered_at[:3] == [2, 1, 0] and found.accepted_at[:3] == [2, 1, 0]


def test_costs_follow_the_shrinking_batch() -> None:
    """Two answers run at once, one of 3 tokens and one of 5: two passes with both, then two on the curve for one."""
    trace = Trace({"max_tokens": 8}, (given_answer([1], [2, 3, 4]), given_answer([5], [6, 7, 8, 9, 10])))
    both = costs((1, (10.0, 10.0)), (2, (99.0, 30.0)))
    found = replay(PLAIN, trace, both)
    assert [sums.steps for sums in found.answers] == [2, 4]
    assert [sums.ms for sums in found.answers] == pytest.approx([2 * 30 / 2, (2 * 30 + 2 * 10) / 2])
    assert found.total.ms == pytest.approx(found.total.plain_ms)


def test_the_cost_of_drafting_is_counted_by_sequence_and_token() -> None:
    """100 us to propose and 10 to plan per sequence, 7 to observe per token: 2 drafts, with 3 tokens in between."""
    trace = Trace({"max_tokens": 6}, (given_answer([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),))
    expense = Expense(propose={"ngram": Line(0.0, 100.0)}, observe={"ngram": Line(0.0, 7.0)}, plan=Line(0.0, 10.0))
    found = replay(setting("ngram", nodes=2, trees=False), trace, costs((1, (10.0,) * 4), expense=expense)).total
    assert found.ms == pytest.approx(20.0 + (2 * 110 + 3 * 7) / 1000) and found.plain_ms == pytest.approx(50.0)


@pytest.mark.parametrize("methods", [("ngram",), ("suffix",), ("token_recycling",), ("suffix", "token_recycling")])
@pytest.mark.parametrize("size", [1, 3])
def test_every_method_replays_complete_answers_deterministically(methods: tuple[str, ...], size: int) -> None:
    trace = toy_trace(ToyTarget(vocab=64, seed=5, order=2), answers=4)
    some = costs((1, (10.0,) * 64), (size, (10.0,) * 64))
    chain = setting(*methods, nodes=4, trees=False)
    found, again = replay(chain, trace, some), replay(chain, trace, some)
    assert found == again and found.total.tokens == trace.num_tokens
    assert found.total.speedup > 1.05 and found.total.mean_acceptance_length == pytest.approx(
        found.total.tokens / found.total.steps, abs=0.05
    )


def test_with_expensive_rows_the_planner_drafts_nothing_and_loses_nothing() -> None:
    trace = toy_trace(ToyTarget(vocab=64, seed=5, order=2))
    expensive = costs((1, tuple(10.0 * n for n in range(1, 33))))
    found = replay(setting("suffix", mode="measured", trees=False), trace, expensive).total
    assert found.speedup == pytest.approx(1.0, abs=0.01)
    assert replay(setting("suffix", mode="static", trees=False), trace, expensive).total.speedup < 0.95


def test_top_ids_reach_the_proposers_that_read_them() -> None:
    trace = toy_trace(ToyTarget(vocab=64, seed=5, order=1))
    blind = Trace(trace.about, tuple(replace(a, topk=np.zeros_like(a.topk)) for a in trace.answers))
    chain = setting("token_recycling", nodes=4, trees=False)
    assert replay(chain, trace, FLAT).total.accepted > 2 * replay(chain, blind, FLAT).total.accepted


def test_uniform_drafts_have_full_length_or_are_empty() -> None:
    trace = toy_trace(ToyTarget(vocab=64, seed=5, order=2))
    found = replay(setting("suffix", mode="measured", nodes=4, trees=False), trace, replace(FLAT, uniform=True)).total
    assert found.drafted > 0 and found.offered_at[0] == found.offered_at[3] > 0
    assert found.speedup > 1.0


def test_the_engines_own_drafter_is_tried_where_it_has_one() -> None:
    subject = ToySubject(Profile("base"), lambda rows: 10.0, batched=True)
    names = [s.name for s in grid(subject.provides, trees=False, most_nodes=8)]
    assert len([name for name in names if name.startswith("builtin(")]) == 6
    assert not any("24" in name.rpartition(",")[2] for name in names)
    similar = replayed_as(ProposerSpec("builtin", BUILTIN))
    assert similar == ProposerSpec("ngram", {"min_match": 2, "max_match": 5})
    assert replayed_as(ProposerSpec("suffix")) == ProposerSpec("suffix")


@pytest.mark.parametrize("concurrency", [(1,), (1, 4)])
def test_a_tune_of_an_engine_that_plans_for_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concurrency: tuple[int, ...]
) -> None:
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    prompts = [Prompt(f"q{i}", f"kind {i % 2}", (f"say {i} things about {i * 7} words",)) for i in range(24)]
    base = Profile("base", engine="vllm", vllm=VllmSettings(max_model_len=512))
    asked = Request(
        model, base, prompts, "toy", "mine", tmp_path / "mine.yaml", budget=300.0, max_tokens=48,
        objective="throughput", concurrency=concurrency,
    )  # fmt: skip
    subject = ToySubject(base, lambda rows: 10.0 + 0.1 * rows, batched=True)
    outcome = tune(asked, opener=lambda request: subject)
    written = profiles.load(asked.out)
    assert written == outcome.profile and written.speculates and written.engine == "vllm"
    measured = written.measured
    assert measured is not None and measured.cost_curve is None and measured.acceptance
    assert [curve.sequences for curve in measured.batch_curves] == list(concurrency)
    assert written.runtime.threads is None and outcome.document["threads"]["chosen"] is None
    assert written.vllm.num_speculative_tokens == written.planner.max_nodes <= 8
    (chosen,) = [line for line in outcome.document["settings"] if line["name"] == outcome.document["chosen"]]
    live = chosen["confirmed"][str(max(concurrency))]["speedup"]
    assert 1.0 < live["low"] <= chosen["predicted"]["speedup"] * 1.02
