"""Replay, checked against arithmetic by hand and against running the same proposers on the toy target itself."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specplug import registry
from specplug.core import Bucket, IntArray, Requires, int_array
from specplug.drafts.guesses import Guesses
from specplug.profile import CostPoints, PlannerSettings
from specplug.registry import ProposerSpec
from specplug.testing import ToyTarget
from specplug.testing import replay as drive
from specplug.tune.candidates import PLAIN, Setting, grid
from specplug.tune.drafter_trace import DrafterTrace, TracedExit, drafter_key
from specplug.tune.expense import Expense, Line
from specplug.tune.prediction import Costs, Prediction
from specplug.tune.replay import replay, replay_all
from specplug.tune.trace import ALONE, Answer, OffPathRows, Trace, save

ROWS = 33


def costs(ms: Sequence[float] = (), *, sequences: int = 1, expense: Expense | None = None) -> Costs:
    """A pass of n rows takes ms[n - 1]; by default every pass takes 10 ms."""
    line = tuple(ms) or (10.0,) * ROWS
    return Costs(CostPoints((0,), tuple(range(1, len(line) + 1)), (line,), sequences), expense or Expense())


def setting(*methods: str, mode: str = "static", nodes: int = 8, trees: bool = True, **options: object) -> Setting:
    specs = tuple(ProposerSpec(method, options) for method in methods)
    return Setting(specs, PlannerSettings(mode=mode, max_nodes=nodes, trees=trees))


def given_answer(prompt: Sequence[int], tokens: Sequence[int], **names: str) -> Answer:
    topk = np.array([[token] for token in tokens[1:]], dtype=np.int32).reshape(len(tokens) - 1, 1)
    return Answer(names.get("id", "p"), 0, names.get("kind", "chat"), int_array(prompt), int_array(tokens), topk)


def toy_trace(target: ToyTarget, answers: int = 4, length: int = 120, off_path_rows: bool = False) -> Trace:
    """The target's answers to prompts of its own, with its top 8 ids at every position."""

    def one(i: int) -> Answer:
        prompt = target.prompt(12, key=i).tolist()
        tokens = target.greedy(prompt, length)
        rows = np.stack([target.topk([*prompt, *tokens[: at + 1]], 8) for at in range(length - 1)])
        extra = _off_path_rows(target, prompt, tokens, rows) if off_path_rows else None
        return Answer(f"p{i}", 0, f"kind {i % 2}", int_array(prompt), int_array(tokens), rows, extra)

    return Trace({"max_tokens": length}, tuple(one(i) for i in range(answers)))


def _off_path_rows(target: ToyTarget, prompt: list[int], tokens: list[int], rows: IntArray) -> OffPathRows:
    at, paths, tops = [], [], []
    for i, row in enumerate(rows):
        for token in row.tolist():
            if token != tokens[i + 1]:
                text = [*prompt, *tokens[: i + 1], token]
                top = target.topk(text, 8)
                at += [i, i]
                paths += [(token, ALONE), (token, int(top[0]))]
                tops += [top, target.topk([*text, int(top[0])], 8)]
    return OffPathRows(int_array(at), np.array(paths, dtype=np.int32), np.stack(tops))


def test_a_repeated_prompt_by_hand() -> None:
    """Prompt and answer are 1..6. Prefill emits the first token, so 5 are left. Prompt lookup of 2 tokens is always
    right from the second token on: one pass of 3 rows emits 2, 3, 4, and another one of 2 rows emits 5, 6."""
    trace = Trace({"max_tokens": 6}, (given_answer([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),))
    found = replay(setting("ngram", nodes=2, trees=False), trace, costs([10.0, 11.0, 13.0, 99.0])).total
    assert (found.tokens, found.steps, found.drafted, found.accepted) == (5, 2, 3, 3)
    assert found.ms == pytest.approx(13.0 + 11.0) and found.plain_ms == pytest.approx(50.0)
    assert found.speedup == pytest.approx(50 / 24) and found.mean_acceptance_length == pytest.approx(2.5)
    assert found.offered_at[:3] == [2, 1, 0] and found.accepted_at[:3] == [2, 1, 0]


def test_a_rejected_draft_by_hand() -> None:
    """`3` follows `1 2` in the prompt, and `4` follows it in the answer: one draft token is rejected, and its row costs
    time."""
    trace = Trace({"max_tokens": 99}, (given_answer([1, 2, 3, 9, 1], [2, 4, 8]),))
    found = replay(setting("ngram", nodes=1), trace, costs([10.0, 14.0])).total
    assert (found.steps, found.drafted, found.accepted) == (2, 1, 0)
    assert found.ms == pytest.approx(24.0) and found.speedup == pytest.approx(20 / 24)


def test_plain_decoding_has_a_speedup_of_1() -> None:
    trace = toy_trace(ToyTarget(seed=3), answers=2, length=20)
    found = replay(PLAIN, trace, costs(expense=Expense(step=Line(100.0, 0.0)))).total
    assert found.steps == found.tokens == 38 and found.speedup == pytest.approx(1.0)
    assert found.ms == pytest.approx(38 * 10.1)


def test_the_measured_cost_of_drafting_is_added() -> None:
    """Two passes by hand, as above: drafts of 2 and 1 tokens, then 3 and 2 emitted tokens."""
    trace = Trace({"max_tokens": 6}, (given_answer([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),))
    expense = Expense(
        propose={"ngram": Line(100.0, 10.0)},
        observe={"ngram": Line(20.0, 1.0)},
        plan=Line(200.0, 5.0),
        step=Line(50.0, 2.0),
    )
    found = replay(setting("ngram", nodes=2, trees=False), trace, costs(expense=expense)).total
    microseconds = (100 + 20) + (100 + 10) + (20 + 3) + (20 + 2) + (200 + 10) + (200 + 5) + (50 + 6) + (50 + 4)
    assert found.ms == pytest.approx(20.0 + microseconds / 1000)
    assert found.plain_ms == pytest.approx(5 * 10.052)


def test_a_measured_planner_stops_drafting_where_rows_are_expensive() -> None:
    """Every further row costs as much as a pass, so only a certain draft token could save time, and none is certain."""
    trace = toy_trace(ToyTarget(seed=1))
    expensive = costs([10.0 * n for n in range(1, ROWS + 1)])
    found = replay(setting("suffix", mode="measured"), trace, expensive).total
    assert found.drafted < 0.02 * found.tokens and found.speedup > 0.98
    cheap = replay(setting("suffix", mode="measured"), trace, costs()).total
    assert cheap.speedup > 1.2
    static = replay(setting("suffix"), trace, expensive).total
    assert static.speedup == pytest.approx(static.tokens / (static.steps + static.drafted)) and static.speedup < 0.9


@pytest.mark.parametrize("methods", [("ngram",), ("suffix",)])
@pytest.mark.parametrize("nodes", [1, 4, 8])
def test_acceptance_is_the_same_as_with_the_proposer_on_the_target(methods: tuple[str, ...], nodes: int) -> None:
    target = ToyTarget(seed=5, order=2)
    trace = toy_trace(target)
    (proposer,) = registry.build_sources([ProposerSpec(method) for method in methods])
    for answer, found in zip(
        trace.answers, replay(setting(*methods, nodes=nodes), trace, costs()).answers, strict=True
    ):
        prompt = [*answer.prompt.tolist(), int(answer.tokens[0])]
        real = drive(proposer, prompt, answer.tokens[1:].tolist(), nodes)
        assert found.steps == len(real.steps)


@pytest.mark.parametrize(("vocab", "seed", "order"), [(256, 2, 2), (64, 5, 2), (256, 7, 3), (512, 3, 2)])
def test_off_path_rows_replace_the_rows_after_rejected_draft_tokens(vocab: int, seed: int, order: int) -> None:
    """Token recycling learns from every evaluated row. With off-path rows, its replay comes close to a live run, whose
    rows the toy target provides; without them, it can need more steps."""
    target = ToyTarget(vocab=vocab, seed=seed, order=order)
    (proposer,) = registry.build_sources([ProposerSpec("token_recycling")])
    steps = 0
    for answer in toy_trace(target).answers:
        prompt = [*answer.prompt.tolist(), int(answer.tokens[0])]
        steps += len(drive(proposer, prompt, answer.tokens[1:].tolist(), 8, lambda text: target.topk(text, 8)).steps)
    blind = replay(setting("token_recycling"), toy_trace(target), costs()).total.steps
    seeing = replay(setting("token_recycling"), toy_trace(target, off_path_rows=True), costs()).total.steps
    assert abs(seeing / steps - 1) < 0.03
    assert vocab != 256 or seed != 7 or blind > 1.06 * steps


def test_answers_that_run_at_once_share_passes() -> None:
    """Two answers of 5 tokens take 4 common passes of two rows without drafts."""
    one = given_answer([1, 2], [11, 12, 13, 14, 15], id="a")
    two = given_answer([1, 2], [21, 22, 23, 24, 25], id="b")
    trace = Trace({"max_tokens": 5}, (one, two))
    found = replay(PLAIN, trace, costs([10.0, 12.0], sequences=2))
    assert found.total.ms == pytest.approx(48.0) and found.answers[0].ms == pytest.approx(24.0)
    assert found.total.steps == 8 and found.total.speedup == pytest.approx(1.0)


def test_drafts_of_answers_that_run_at_once_by_hand() -> None:
    """Two repeated prompts as in the first test: passes of 3 + 3 and 2 + 2 rows; plain decoding takes five of two."""
    answers = [given_answer([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], id=name) for name in "ab"]
    line = [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    trace = Trace({"max_tokens": 6}, tuple(answers))
    found = replay(setting("ngram", nodes=4, trees=False), trace, costs(line, sequences=2))
    assert found.total.drafted == 6 and found.total.ms == pytest.approx(15.0 + 13.0)
    assert found.total.plain_ms == pytest.approx(5 * 11.0)


def test_the_last_answer_of_a_group_runs_at_the_cost_of_one_row() -> None:
    short, long = given_answer([1, 2], [11, 12], id="a"), given_answer([3, 4], [21, 22, 23, 24], id="b")
    found = replay(PLAIN, Trace({"max_tokens": 4}, (short, long)), costs([10.0, 12.0], sequences=2))
    assert found.total.ms == pytest.approx(12.0 + 10.0 + 10.0)


def test_reading_top_ids_costs_time_per_row() -> None:
    """Token recycling proposes nothing for a text in which no token occurs twice: three passes of one row."""
    trace = Trace({"max_tokens": 9}, (given_answer([1, 2], [3, 4, 5, 6]),))
    expense = Expense(topk=Line(60.0, 40.0), idle=Line(7.0, 0.0), propose={"token_recycling": Line(5.0, 1.0)})
    found = replay(setting("token_recycling", nodes=2), trace, costs(expense=expense)).total
    assert found.drafted == 0 and found.ms == pytest.approx(3 * (10.0 + 0.1 + 0.012))


def test_every_change_of_the_row_count_costs_time() -> None:
    """As in the first test, passes have 3 and 2 rows: two changes. Plain decoding has one change, after the prompt."""
    trace = Trace({"max_tokens": 6}, (given_answer([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),))
    points = CostPoints((0,), (1, 2, 3), ((10.0, 11.0, 13.0),), change_ms=2.0)
    found = replay(setting("ngram", nodes=2, trees=False), trace, Costs(points, Expense())).total
    assert found.ms == pytest.approx(24.0 + 4.0) and found.plain_ms == pytest.approx(50.0 + 2.0)


# -- early exits ------------------------------------------------------------------------------------------------------

EXITS = [ProposerSpec("early_exit", {"model": "/models/exits", "exit": layers}) for layers in (2, 4)]
CHOICE = ProposerSpec("early_exit", {"model": "/models/exits"})
RULE = ProposerSpec("early_exit", {"model": "/models/exits", "rule": "layers", "max_draft": 18})


def traced_exit(trace: Trace, layers: int, *, right: bool, ms: float) -> DrafterTrace:
    """An exit of a target with 8 layers, whose tokens are all right, or all wrong."""
    guesses = {
        (one.prompt_id, one.turn): Guesses(
            one.tokens[1:] + np.int32(not right), np.full(len(one.tokens) - 1, not right, dtype=np.int32)
        )
        for one in trace.answers
    }
    buckets = (Bucket("sure", 0.95), Bucket("unsure", 0.2))
    return DrafterTrace(buckets, (ms,), 0.1, 1.0, 8, None, guesses, exit=TracedExit("/models/exits", layers, 8))


@pytest.mark.parametrize("pays", [True, False])
def test_both_rules_of_choosing_are_replayed_by_the_records_of_each_exit(pays: bool) -> None:
    """Only the second exit is right, if any. The choice finds it, or stops; the rule of DEL, which compares layers and
    always drafts, loses where none is right."""
    trace = toy_trace(ToyTarget(vocab=4096, order=64, branches=64))
    line = tuple(10.0 + 0.5 * rows for rows in range(ROWS))
    traced = [traced_exit(trace, 2, right=False, ms=0.4), traced_exit(trace, 4, right=pays, ms=0.5)]
    drafters = {drafter_key(spec): one for spec, one in zip(EXITS, traced, strict=True)}
    measured = replace(costs(line), drafters=drafters)

    def speed(spec: ProposerSpec) -> float:
        found = [one for one in grid(Requires(), named=[spec]) if one.proposers == (spec,)]
        return max(replay(one, trace, measured).total.speedup for one in found)

    first, second, chosen, by_layers = map(speed, (*EXITS, CHOICE, RULE))
    if pays:
        assert first < 1.0 < 2.0 < 0.8 * second < chosen and by_layers > 2.0
    else:
        assert min(first, second, chosen) > 0.95 > 0.8 > by_layers


def test_the_rule_of_the_paper_is_tried_with_its_own_planner_alone() -> None:
    found = [one for one in grid(Requires(), named=[RULE]) if RULE in one.proposers]
    assert [(one.planner.mode, one.planner.max_nodes, one.planner.trees) for one in found] == [("static", 18, False)]
    assert all(one.planner.mode == "measured" for one in grid(Requires(), named=[CHOICE]) if CHOICE in one.proposers)


def test_turns_of_one_conversation_never_run_at_once() -> None:
    first = given_answer([1], [1, 2, 3], id="a")
    second = Answer("a", 1, "chat", int_array([1, 2, 3, 4]), int_array([5, 6, 7]), first.topk)
    found = replay(PLAIN, Trace({"max_tokens": 3}, (first, second)), costs([10.0, 12.0], sequences=2))
    assert found.total.ms == pytest.approx(40.0)


def test_figures_by_category_add_up() -> None:
    found = replay(setting("suffix"), toy_trace(ToyTarget(seed=5)), costs())
    categories = found.by_category()
    assert list(categories) == ["kind 0", "kind 1"]
    assert sum(sums.tokens for sums in categories.values()) == found.total.tokens
    assert sum(sums.ms for sums in categories.values()) == pytest.approx(found.total.ms)


def test_learned_acceptance_is_kept_by_the_bucket_names_of_live_drafting() -> None:
    found = replay(setting("suffix", "token_recycling"), toy_trace(ToyTarget(seed=5)), costs())
    fused = registry.build([ProposerSpec("suffix"), ProposerSpec("token_recycling")])
    assert found.learned and found.learned.keys() <= {bucket.name for bucket in fused.buckets}
    again = replay(setting("suffix"), toy_trace(ToyTarget(seed=5)), costs(), learned={"local one 4": (0.0, 1e9)})
    assert again.total.drafted > 0


def test_replays_in_several_processes_are_deterministic(tmp_path: Path) -> None:
    """The result does not depend on the process or on the order."""
    trace = toy_trace(ToyTarget(seed=5), off_path_rows=True)
    path = tmp_path / "trace.npz"
    save(trace, path)
    settings = [
        setting(method, mode=mode) for method in ("ngram", "token_recycling") for mode in ("static", "measured")
    ]
    expense = Expense(propose={"ngram": Line(30.0, 3.0)}, topk=Line(60.0, 40.0))
    found = dict(replay_all(settings, path, costs(expense=expense), workers=2))
    assert list(found.keys() ^ set(settings)) == []
    for one in settings:
        assert _plain(found[one]) == _plain(replay(one, trace, costs(expense=expense)))


def test_settings_that_did_not_start_in_time_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    save(toy_trace(ToyTarget(seed=5), answers=1, length=10), path)
    settings = [setting("ngram", nodes=nodes) for nodes in range(1, 30)]
    assert 1 <= len(list(replay_all(settings, path, costs(), seconds=0.0, workers=2))) <= 4


def _plain(prediction: Prediction) -> str:
    total = prediction.total
    return json.dumps([total.ms, total.steps, total.drafted, total.accepted, sorted(prediction.learned.items())])
