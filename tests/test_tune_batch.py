"""Replay with one plan for a batch, checked against arithmetic by hand; and a tune of an engine that plans this way."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_tune_replay import given_answer, setting, toy_trace
from toy_subject import ToySubject

from specplug import profile as profiles
from specplug.bench.workloads import Prompt
from specplug.errors import UsageError
from specplug.profile import CostPoints, PlannerSettings, Profile, VllmSettings
from specplug.registry import ProposerSpec
from specplug.testing import ToyTarget
from specplug.tune import choosing_stages
from specplug.tune.candidates import BUILTIN, BUILTIN_ON_DEVICE, PLAIN, Setting, grid
from specplug.tune.device_settings import EnginePlanning, by_batch_size, device_grid
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


SUFFIX = ProposerSpec("suffix")
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


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A tune of a toy on vLLM, in folders of its own."""
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    prompts = [Prompt(f"q{i}", f"kind {i % 2}", (f"say {i} things about {i * 7} words",)) for i in range(24)]
    base = Profile("base", engine="vllm", vllm=VllmSettings(max_model_len=512))
    return Request(
        model, base, prompts, "toy", "mine", tmp_path / "mine.yaml", budget=300.0, max_tokens=48, objective="throughput"
    )


@pytest.mark.parametrize("concurrency", [(1,), (1, 4)])
def test_a_tune_of_an_engine_that_plans_for_a_batch(asked: Request, concurrency: tuple[int, ...]) -> None:
    asked = replace(asked, concurrency=concurrency)
    subject = ToySubject(asked.base, lambda rows: 10.0 + 0.1 * rows, batched=True)
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


# -- an engine that plans itself: vLLM's V2 runner ---------------------------------------------------------------------


def test_every_number_of_draft_tokens_is_replayed_where_the_batch_size_decides() -> None:
    settings = device_grid([SUFFIX, ProposerSpec("token_recycling")], "batch_size", 8)
    own = [one for one in settings if one.lengths]
    assert len({one.name for one in settings}) == len(settings) and len(own) == 3 * 8
    assert {one.method for one in own} == {"suffix", "token_recycling", "suffix + token_recycling"}
    assert {one.proposers[0].options["name"] for one in settings if not one.lengths} == {"ngram_gpu"}
    assert not any(one.lengths for one in device_grid([SUFFIX], "adaptive", 8))
    corpus = ProposerSpec("datastore", {"corpora": ["x"]})
    with_corpus = device_grid([SUFFIX, corpus], "batch_size", 2)
    assert {one.method for one in with_corpus if one.lengths} == {"suffix", "datastore", "suffix + datastore"}
    assert all(spec == corpus for one in with_corpus for spec in one.proposers if spec.method == "datastore")


def test_filler_is_verified_where_a_sequence_has_no_draft() -> None:
    """Nothing repeats, so every pass has three rows of filler and emits one token."""
    trace = Trace({"max_tokens": 6}, (given_answer([1, 2, 3], [4, 5, 6, 7, 8, 9]),))
    three = Setting((ProposerSpec("suffix"),), PlannerSettings(max_nodes=3, trees=False), ((1, 1, 3), (2, 9, 0)))
    ms = (10.0, 11.0, 13.0, 17.0, 99.0)
    builtin = Setting(
        (ProposerSpec("builtin", BUILTIN_ON_DEVICE),), PlannerSettings(mode="static", max_nodes=3, trees=False)
    )
    for one in (three, builtin):
        found = replay(one, trace, costs((1, ms))).total
        assert (found.steps, found.drafted, found.ms, found.plain_ms) == (5, 0, 5 * 17.0, 5 * 10.0)


def test_nothing_is_drafted_at_batch_sizes_without_draft_tokens() -> None:
    same = [given_answer([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]) for _ in range(2)]
    setting = Setting((ProposerSpec("suffix"),), PlannerSettings(max_nodes=3, trees=False), ((1, 1, 3), (2, 9, 0)))
    two = costs((1, (10.0,) * 8), (2, (10.0,) * 8))
    assert replay(setting, Trace({"max_tokens": 6}, tuple(same)), two).total.drafted == 0
    assert replay(setting, Trace({"max_tokens": 6}, tuple(same[:1])), FLAT).total.accepted == 3


def test_the_best_number_of_draft_tokens_is_combined_by_batch_size() -> None:
    trace = toy_trace(ToyTarget(vocab=64, seed=5, order=2))
    cheap, dear = (10.0,) * 9, tuple(10.0 * (1 + n) for n in range(9))
    curves = [CostPoints((0,), tuple(range(1, 10)), (cheap,), 1)]
    curves += [CostPoints((0,), (1, *(4 * (1 + n) for n in range(9))), ((dear[0], *dear),), 4)]
    predicted = {
        one: replay(one, trace, Costs(curves[0], Expense(), tuple(curves)))
        for one in device_grid([SUFFIX], "batch_size", 8)
    }
    (found,) = by_batch_size(dict(reversed(predicted.items())), curves)
    assert [(first, last) for first, last, _ in found.lengths] == [(1, 1), (2, 1024)]
    longest = found.lengths[0][2]
    assert longest > 1 and found.lengths[1][2] == 0 and found.planner.max_nodes == longest
    speeds = [one.total.speedup for setting, one in predicted.items() if setting.lengths]
    assert speeds[longest - 1] == pytest.approx(max(speeds), rel=0.01)
    expensive = [replace(curves[0], ms=(dear,)), curves[1]]
    assert by_batch_size(predicted, expensive) == []


@pytest.mark.parametrize("planning", ["batch_size", "adaptive"])
def test_a_tune_of_an_engine_that_plans_itself(asked: Request, planning: EnginePlanning) -> None:
    asked = replace(asked, concurrency=(1, 4))
    subject = ToySubject(asked.base, lambda rows: 10.0 + 0.1 * rows, batched=True)
    subject.engine_planning = planning
    outcome = tune(asked, opener=lambda request: subject)
    written = profiles.load(asked.out)
    assert written == outcome.profile and written.speculates
    assert written.measured is not None and not written.measured.batch_curves and written.measured.acceptance
    schedule = written.vllm.tokens_per_batch_size
    if planning == "adaptive":
        assert not schedule and written.vllm.num_speculative_tokens == 8
    else:
        assert schedule[0][0] == 1 and schedule[-1] == (5, 1024, 0)
        assert written.vllm.num_speculative_tokens == max(length for _, _, length in schedule) > 1


def test_a_tune_writes_plain_decoding_where_no_number_of_draft_tokens_pays(asked: Request) -> None:
    subject = ToySubject(asked.base, lambda rows: 10.0 * rows, batched=True)
    subject.engine_planning = "batch_size"
    outcome = tune(asked, opener=lambda request: subject)
    assert not outcome.profile.speculates and not outcome.profile.vllm.tokens_per_batch_size
    names = [line["name"] for line in outcome.document["settings"]]
    assert names and not any(" for 1" in name for name in names), "a setting that never pays is not even a candidate"
    assert sum(bool(line["confirmed"]) for line in outcome.document["settings"]) == 1, "vLLM's own, in one engine"


def interrupt(asked: Request, subject: ToySubject, after: int) -> list[str]:
    """Tune until so many answers were asked for live; returns the names of the settings that were asked."""
    answered: list[str] = []

    def stop(name: str) -> None:
        answered.append(name)
        if len(answered) == after:
            raise KeyboardInterrupt

    subject.on_answer = stop
    with pytest.raises(KeyboardInterrupt):
        tune(asked, opener=lambda request: subject)
    return answered


def test_an_interrupted_tune_confirms_the_tables_that_it_had_combined(
    asked: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(asked, concurrency=(1, 4))
    subject = ToySubject(asked.base, lambda rows: 10.0 + 0.1 * rows, batched=True)
    subject.engine_planning = "batch_size"
    answered = interrupt(asked, subject, 40)
    again = ToySubject(asked.base, lambda rows: 10.0 + 0.1 * rows, batched=True)
    again.engine_planning = "batch_size"
    again.max_tokens = asked.max_tokens  # nothing is recorded again

    def must_not_combine(*rest: object) -> list[Setting]:
        raise AssertionError

    monkeypatch.setattr(choosing_stages, "by_batch_size", must_not_combine)
    outcome = tune(replace(asked, resume=True), opener=lambda request: again)
    assert outcome.document["chosen"] in answered and outcome.profile.vllm.tokens_per_batch_size


def test_a_journal_of_another_runner_is_refused(asked: Request) -> None:
    first = ToySubject(asked.base, lambda rows: 10.0 + 0.1 * rows, batched=True)
    interrupt(asked, first, 1)
    other = ToySubject(asked.base, lambda rows: 10.0 + 0.1 * rows, batched=True)
    other.engine_planning = "batch_size"
    with pytest.raises(UsageError, match="specplug's planner chooses the draft tokens, and now the batch size does"):
        tune(replace(asked, resume=True), opener=lambda request: other)
