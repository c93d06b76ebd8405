"""The parts of a tune that work with numbers: budget, cost, expense, settings, selection, journal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_subject import ToyTimer

from specplug.bench.arms import Result
from specplug.bench.statistics import median_interval
from specplug.core import EMPTY, Bucket, Draft, IntArray, Requires, Step, int_array
from specplug.drafts.guesses import Guesses
from specplug.drafts.retrieval import Window
from specplug.errors import UsageError
from specplug.profile import PlannerSettings, Profile
from specplug.profile.with_drafter import drafter_name
from specplug.registry import ProposerSpec
from specplug.tune import journal as journals
from specplug.tune.budget import CONFIRM_SHARE, SHARES, Budget, answers_to_record, parse, too_small
from specplug.tune.candidates import PLAIN, PRUNED, Setting, grid
from specplug.tune.confirm import IDLE, confirm
from specplug.tune.cost_curves import Curve, choose_threads, measure_curve
from specplug.tune.drafter_trace import DrafterTrace, RecordedDrafter
from specplug.tune.expense import Expense, Line, PricedProposer, SimulatedClock, TimedProposer
from specplug.tune.own_drafters import drafters_to_try
from specplug.tune.selection import Pairs, is_decided, select_finalists, select_winners, undecided
from specplug.tune.trace import Answer, Trace

# -- budget -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("300", 300), (" 2M ", 120)])
def test_a_budget_is_read_from_text(text: str, seconds: float) -> None:
    assert parse(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "5 minutes", "nan", "inf", "1e3", "5d", "0s", "٣"])
def test_text_that_is_not_a_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a time"):
        parse(text)


def test_stages_get_their_share_and_confirming_gets_the_remainder() -> None:
    now = [100.0]
    budget = Budget(200.0, clock=lambda: now[0])
    assert budget.of("record") == pytest.approx(SHARES["record"] * 200)
    now[0] += 130.0  # 70 s are left, 50 of them for confirming
    assert budget.of("record") == pytest.approx(20.0) and budget.left == pytest.approx(70.0)
    now[0] += 20.0
    assert budget.of("record") == 0.0
    assert sum(SHARES.values()) + CONFIRM_SHARE <= 1.0
    assert Budget(200.0, 150.0, clock=lambda: now[0]).left == pytest.approx(50.0)


def test_prompts_are_taken_from_the_categories_in_turn() -> None:
    lengths = {"a": [10, 20, 30], "b": [40]}
    assert answers_to_record(lengths, 100, seconds=1e9, prompt_ms=1.0, token_ms=1.0) == (
        [("a", 0), ("b", 0), ("a", 1), ("a", 2)],
        100,
    )


def test_prompts_are_dropped_before_answers_are_shortened() -> None:
    lengths = {"a": [0] * 9, "b": [0] * 9}

    def plan(seconds: float) -> tuple[int, int]:
        order, tokens = answers_to_record(lengths, 100, seconds=seconds, prompt_ms=0.0, token_ms=10.0)
        return len(order), tokens

    assert plan(18.0) == (18, 100)
    assert plan(9.0) == (9, 100)
    assert plan(4.0) == (4, 100)
    count, tokens = plan(2.0)
    assert count == 4 and 25 <= tokens <= 50
    assert plan(0.6) == (2, 25)
    with pytest.raises(UsageError, match=r"too small: one answer of 25 tokens takes 0\.2 s, and there are 0\.1 s"):
        plan(0.1)


def test_a_budget_that_is_too_small_comes_with_one_that_suffices() -> None:
    # 21.4 s are needed and 11.7 s are there: 90 s have to become 164.6 s
    assert str(too_small("timing", 21.4, 11.7).named(90.0)) == (
        "the budget is too small: timing takes 21.4 s, and there are 11.7 s for it; say --budget 180s"
    )
    assert str(too_small("timing", 60.0, 10.0, remedy="shorten the prompts").named(90.0)).endswith(
        "say --budget 9m, or shorten the prompts"
    )
    assert str(too_small("timing", 60.0, 0.0).named(90.0)).endswith("raise --budget")


# -- cost -------------------------------------------------------------------------------------------------------------


def noisy(seed: int = 0, outliers: float = 0.0) -> Callable[[int], float]:
    draw = np.random.default_rng(seed)
    return lambda rows: (5.0 + rows) * draw.normal(1.0, 0.01) * (4.0 if draw.random() < outliers else 1.0)


def test_medians_are_close_to_the_true_times_and_measuring_stops_when_settled() -> None:
    timer = ToyTimer(noisy())
    curve = measure_curve(timer, 12, (100, 200), seconds=60.0)
    assert curve.contexts == (100, 200) and curve.rows == tuple(range(1, 13))
    for rows, interval in zip(curve.rows, curve.intervals[0], strict=True):
        assert interval.median == pytest.approx((5.0 + rows) * 1.001, rel=0.02)
        assert interval.low <= interval.median <= interval.high <= 1.03 * interval.median
    assert curve.rounds < 40 and not curve.notes
    assert curve.points.sequences == 1 and curve.prompt_ms == pytest.approx(0.1)
    assert Curve.from_mapping(curve.as_mapping()).points == curve.points


def test_rounds_are_interleaved_and_every_point_is_run_twice() -> None:
    timer = ToyTimer(noisy())
    measure_curve(timer, 3, (100,), seconds=60.0)
    rows = [n for call, n in timer.calls if call == "time"][3:15]
    assert rows == [1, 1, 2, 2, 3, 3] * 2


def test_the_cost_of_changing_the_row_count_is_measured_separately() -> None:
    """A pass after a pass with another row count takes 2 ms more."""
    last = [0]

    def ms(rows: int) -> float:
        changed, last[0] = rows != last[0], rows
        return 10.0 + rows + 2.0 * changed

    curve = measure_curve(ToyTimer(ms), 6, (100,), seconds=60.0)
    assert curve.change_ms == pytest.approx(2.0, rel=0.01) and curve.points.change_ms == curve.change_ms
    assert curve.points.ms[0][2] == pytest.approx(13.0, rel=0.01)


def test_outliers_and_non_monotonic_costs_are_noted() -> None:
    curve = measure_curve(ToyTimer(noisy(outliers=0.05)), 8, (100,), seconds=60.0)
    assert any("another program was running" in note for note in curve.notes)
    assert curve.intervals[0][3].median == pytest.approx(9.0, rel=0.05)
    noise = noisy()
    sawtooth = measure_curve(ToyTimer(lambda rows: noise(rows) - 3 * (rows == 4)), 6, (100,), seconds=60.0)
    assert any("3 rows cost more than 4" in note for note in sawtooth.notes)


def test_a_budget_too_small_for_three_rounds_is_refused_before_they_are_run() -> None:
    timer = ToyTimer(lambda rows: 1000.0 * rows)
    with pytest.raises(UsageError, match=r"too small: timing passes of 1 to 9 rows takes 144\.1 s"):
        measure_curve(timer, 9, (100,), seconds=60.0)
    assert len(timer.calls) == 4


def test_points_that_are_not_settled_are_noted() -> None:
    draw = np.random.default_rng(3)
    curve = measure_curve(ToyTimer(lambda rows: rows * draw.uniform(0.5, 1.5)), 4, (100,), seconds=60.0)
    assert curve.rounds == 60 and any("wider than 3%" in note for note in curve.notes)


def test_a_fill_that_takes_too_long_is_left_out() -> None:
    class Slow(ToyTimer):
        def fill(self, tokens: int) -> float:
            super().fill(tokens)
            return 10.0 * tokens

    curve = measure_curve(Slow(noisy()), 4, (100, 5000), seconds=20.0)
    assert curve.contexts == (100,) and any("5000 tokens were left out" in note for note in curve.notes)


def test_fewer_rows_than_sequences_are_timed_too() -> None:
    """When some sequences have ended, passes have fewer rows. Without their costs, drafts would look free there."""
    curve = measure_curve(ToyTimer(noisy(), sequences=4), 12, (100,), seconds=60.0)
    assert curve.rows == (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12) and curve.points.sequences == 4
    assert curve.points.ms[0][0] == pytest.approx(6.0, rel=0.02)


def test_the_thread_count_with_the_fastest_pass_is_chosen() -> None:
    class Threaded(ToyTimer):
        def use_threads(self, threads: int) -> None:
            self.threads = threads

        def time(self, rows: int) -> float:
            return abs(self.threads - 3) + 5.0 + rows

    chosen, batch, ms = choose_threads(Threaded(noisy()), 4, seconds=0.0)
    assert chosen == batch == 3 and ms == {1: 8.0, 2: 7.0, 3: 6.0, 4: 7.0}


@pytest.mark.parametrize(("four_rows", "batch"), [(lambda threads: 40.0 / threads, 4), (lambda threads: 40.0, 1)])
def test_passes_of_several_rows_get_threads_of_their_own_where_these_are_faster(
    four_rows: Callable[[int], float], batch: int
) -> None:
    class Threaded(ToyTimer):
        def use_threads(self, threads: int) -> None:
            self.threads = threads

        def time(self, rows: int) -> float:
            return 5.0 + self.threads if rows == 1 else four_rows(self.threads)

    assert choose_threads(Threaded(noisy()), 4, seconds=0.0)[:2] == (1, batch)


@given(st.lists(st.floats(1.0, 100.0), min_size=1, max_size=40))
def test_the_interval_of_a_median_consists_of_values_around_it(values: list[float]) -> None:
    found = median_interval(values)
    assert found.low in values and found.high in values and found.low <= found.median <= found.high
    assert found.median == pytest.approx(float(np.median(values)))


def test_the_interval_of_a_median_contains_the_true_median_95_times_in_100() -> None:
    draw = np.random.default_rng(1)
    held = [(i := median_interval(draw.exponential(size=25).tolist())).low <= np.log(2) <= i.high for _ in range(2000)]
    assert 0.94 <= np.mean(held) <= 0.985


# -- expense ----------------------------------------------------------------------------------------------------------


def test_a_line_goes_through_medians() -> None:
    points = [(1, 12.0), (1, 12.0), (1, 900.0), (3, 16.0), (3, 16.0), (3, 16.0)]
    line = Line.through(points)
    assert (line.base, line.per) == (10.0, 2.0) and line.ns(4) == 18_000
    assert Line.through([(2, 8.0)]) == Line(8.0, 0.0) and Line.through([]) == Line()
    falling = Line.through([(1, 9.0), (5, 3.0)])
    assert falling.per == 0.0 and falling.base == pytest.approx(6.0)
    steep = Line.through([(1, 1.0), (9, 30.0)])
    assert steep.base >= 0.0
    assert Line.through([(2, -3.0), (4, -3.0)]) == Line()


class Two:
    """Proposes two tokens, or none where the budget is 0."""

    requires = Requires()
    buckets: tuple[Bucket, ...] = (Bucket("two", 0.5),)

    def begin(self, seq: int, prompt: IntArray) -> None: ...

    def propose(self, seq: int, budget: int) -> Draft:
        return Draft.chain([1, 2][:budget], [0, 0][:budget]) if budget else EMPTY

    def observe(self, seq: int, step: Step) -> None: ...

    def end(self, seq: int) -> None: ...


def test_a_priced_proposer_advances_the_simulated_clock() -> None:
    clock = SimulatedClock()
    expense = Expense(
        propose={"two": Line(10.0, 1.0)}, observe={"two": Line(3.0, 0.5)}, plan=Line(40.0, 2.0), idle=Line(7.0, 0.0)
    )
    priced = PricedProposer(Two(), clock, expense, "two", sharing=2)
    assert len(priced.propose(0, 8)) == 2 and clock() == (12 + 20 + 4) * 1000
    clock.now = 0
    assert len(priced.propose(0, 0)) == 0 and clock() == 10_000 + 3_500
    clock.now = 0
    priced.observe(0, Step([5, 6], EMPTY, []))
    assert clock() == 4_000
    data = expense.as_mapping()
    assert Expense.from_mapping(data) == expense
    assert list(data) == ["ask", "tell", "plan", "idle", "topk", "step"], "journals and profiles keep these names"


def test_a_timed_proposer_drafts_the_sizes_in_turn() -> None:
    ticks = iter(range(0, 10**9, 1000))
    timed = TimedProposer(Two(), (1, 2), clock=lambda: next(ticks))
    assert [len(timed.propose(0, 8)) for _ in range(3)] == [1, 2, 1]
    timed.observe(0, Step([5], EMPTY, []))
    assert timed.proposed == [(1, 1.0), (2, 1.0), (1, 1.0)] and timed.observed == [(1, 1.0)]


# -- settings ---------------------------------------------------------------------------------------------------------


def test_the_grid_has_every_method_alone_and_in_pairs_with_unique_names() -> None:
    settings = grid(Requires(topk=64))
    assert len({setting.name for setting in settings}) == len(settings) > 100
    methods = {setting.method for setting in settings}
    assert {"ngram", "suffix", "token_recycling", "ngram + suffix", "suffix + token_recycling"} <= methods
    assert PLAIN not in settings and not PLAIN.speculates and PLAIN.name == "none"
    assert all(setting.profile(Profile("base"), "x").proposers == setting.proposers for setting in settings)


def test_the_grid_leaves_out_methods_that_the_engine_does_not_provide_for() -> None:
    blind = grid(Requires())
    assert blind and not any("token_recycling" in setting.method for setting in blind)
    small = grid(Requires(topk=64), most_nodes=6)
    assert max(setting.planner.max_nodes for setting in small) == 6 and grid(Requires(topk=64), most_nodes=0) == []
    assert {setting.planner.mode for setting in small} == {"static", "measured"}
    chains = grid(Requires(topk=64), trees=False)
    assert not any(setting.planner.trees for setting in chains)


# -- selection --------------------------------------------------------------------------------------------------------


def made(method: str, nodes: int = 8) -> Setting:
    return Setting((ProposerSpec(method),), PlannerSettings(max_nodes=nodes))


def pairs(ratios: list[float], categories: list[str] | None = None, repeats: int = 2) -> Pairs:
    """Answers with these speedups over plain decoding, each measured `repeats` times."""
    line = Pairs()
    for _ in range(repeats):
        for i, ratio in enumerate(ratios):
            line.add(f"g{i}", categories[i] if categories else f"kind {i % 2}", f"a{i}", (100, 1.0, 100, ratio))
    return line


def test_finalists_have_different_methods_first() -> None:
    predicted = {made("ngram", 8): 1.5, made("ngram", 4): 1.4, made("suffix"): 1.2, made("token_recycling"): 0.9}
    assert select_finalists(predicted) == [made("ngram", 8), made("suffix"), made("token_recycling")]
    assert select_finalists({made("ngram", n): 1 + n / 10 for n in (1, 2, 3, 4)}) == [
        made("ngram", n) for n in (4, 3, 2)
    ]
    assert select_finalists({}) == []


def test_the_winner_is_faster_than_plain_decoding_by_more_than_the_noise() -> None:
    sure, unsure, slow = pairs([1.3, 1.2, 1.4] * 4), pairs([0.5, 2.5, 0.6] * 2), pairs([0.9] * 9)
    assert select_winners({made("ngram"): sure, made("suffix"): unsure, made("none"): slow}) == [made("ngram")]
    reasons = [line.why_rejected() for line in (sure, unsure, slow)]
    assert reasons == [None, "not shown to be faster", "not faster"]
    assert select_winners({}) == []
    faster = pairs([1.5, 1.4] * 5)
    assert select_winners({made("ngram"): sure, made("suffix"): faster}) == [made("suffix"), made("ngram")]


def test_the_winner_is_faster_than_its_own_engine_with_drafting_disabled() -> None:
    line = Pairs()
    for i, own in enumerate([1.0, 0.9, 1.1] * 3):  # idle engine 1.0 s, drafts 0.9 to 1.1 s, plain 1.3 s
        line.add(f"g{i}", "chat", f"a{i}", (100, own, 100, 1.3, 100, 1.0))
    overall, over_idle, idle = line.speedup(), line.speedup_over_idle(), line.idle_speedup()
    assert overall is not None and over_idle is not None and idle is not None
    assert overall.low > 1.1 and over_idle.median == pytest.approx(1.0, abs=0.03)
    assert idle.median == pytest.approx(1.3)
    why = str(line.why_rejected())
    assert why.startswith("not shown to be faster than the same engine with drafting disabled (1.0")
    assert not line.is_slower()
    for i, own in enumerate([1.1, 1.15, 1.2] * 3):  # slower than the idle engine, faster than plain decoding
        line.add(f"h{i}", "code", f"b{i}", (100, own, 100, 1.3, 100, 1.0))
    assert line.slow_categories() == ["code"]
    slow = Pairs()
    for i in range(9):
        for _ in range(2):
            slow.add(f"g{i}", "chat", f"a{i}", (100, 1.1, 100, 1.3, 100, 1.0))
    assert slow.is_slower() and undecided({made("ngram"): slow}, ["chat"]) == []
    assert pairs([1.3] * 9).speedup_over_idle() is None and pairs([1.3] * 9).idle_speedup() is None


class FixedArm:
    """Answers every prompt with three tokens in `seconds`."""

    profile = None

    def __init__(self, name: str, seconds: float) -> None:
        self.name = name
        self.seconds = seconds

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        return [Result([1, 2, 3], self.seconds, None) for _ in prompts]

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("with_idle", [False, True])
def test_groups_measured_without_the_idle_engine_are_measured_again_where_there_is_one(with_idle: bool) -> None:
    setting = made("ngram")
    empty = np.zeros((2, 0), dtype=np.int32)
    answers = [Answer(f"a{i}", 0, "chat", int_array([i]), int_array([1, 2, 3]), empty) for i in range(2)]
    trace = Trace({"max_tokens": 3}, tuple(answers))
    kept: list[Mapping[str, Sequence[Sequence[float]]]] = []
    found = confirm(
        {PLAIN: FixedArm("plain", 1.5), setting: FixedArm("ngram", 1.0)},
        trace,
        1,
        left=lambda: 100.0,
        idle=FixedArm("idle", 1.25) if with_idle else None,
        earlier=[{PLAIN.name: [[2, 9.0]], setting.name: [[2, 1.0]]}],
        store=kept.append,
        rounds=1,
        until_clear=False,
    )
    names = sorted({PLAIN.name, setting.name} | ({IDLE} if with_idle else set()))
    assert [sorted(measured) for measured in kept] == [names] * (2 if with_idle else 1)
    idle, speedup = found[setting].idle_speedup(), found[setting].speedup()
    if with_idle:
        assert idle is not None and idle.median == pytest.approx(1.5 / 1.25)
        assert speedup is not None and speedup.median == pytest.approx(1.5)
    else:
        assert idle is None and speedup is not None and speedup.median == pytest.approx((9.0 + 1.5) / 2.0)


def test_repeats_of_the_same_answers_do_not_enlarge_the_sample() -> None:
    """Four answers stay four answers, and intervals keep their width, however often answers are measured."""
    assert "too few different answers: 4" in str(pairs([2.0] * 4, repeats=50).why_rejected())
    once, often = pairs([0.8, 1.0, 1.2, 1.4, 1.6], repeats=1), pairs([0.8, 1.0, 1.2, 1.4, 1.6], repeats=40)
    one, many = once.speedup(), often.speedup()
    assert one is not None and many is not None
    assert (one.low, one.high) == (pytest.approx(many.low), pytest.approx(many.high))


def test_a_setting_that_is_slower_in_one_category_does_not_win() -> None:
    mixed = pairs([2.0, 0.9] * 12, ["code", "chat"] * 12)
    assert mixed.slow_categories() == ["chat"] and mixed.why_rejected() == "slower on chat prompts"
    assert select_winners({made("ngram"): mixed}) == []
    few = pairs([2.0, 2.0, 2.0, 2.0, 0.9, 0.9], ["code"] * 4 + ["chat"] * 2)
    assert few.slow_categories() == []


def test_losing_settings_are_not_measured_further_once_every_category_was_measured_twice() -> None:
    seen = {made("ngram"): pairs([1.5] * 6), made("suffix"): pairs([1.1] * 6), made("none"): pairs([0.8] * 6)}
    assert undecided(seen, ["kind 0", "kind 1"]) == [made("ngram")]
    assert undecided(seen, ["kind 0", "kind 1", "never seen"]) == list(seen)
    assert is_decided(seen, [made("ngram")]) and is_decided(seen, []) and not is_decided(seen, list(seen))
    close = {made("ngram"): pairs([1.5, 1.3] * 4), made("suffix"): pairs([1.4, 1.35] * 4)}
    assert undecided(close, ["kind 0", "kind 1"]) == list(close)


# -- journal ----------------------------------------------------------------------------------------------------------


def test_entries_are_read_back_and_more_can_be_added(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "j.journal"
    with journals.opened(path, resume=False) as journal:
        journal.add("begun", spent=0.5)
        assert journal.spent == 0.5
        journal.add("pair", seen={"none": [1, 0.25]}, spent=2.5)
    with journals.opened(path, resume=True) as journal:
        assert journal.last("pair") == {"kind": "pair", "seen": {"none": [1, 0.25]}, "spent": 2.5}
        assert journal.spent == 2.5
        journal.add("pair", seen={"none": [2, 0.5]})
    with journals.opened(path, resume=True) as journal:
        assert [entry["seen"]["none"][0] for entry in journal.of("pair")] == [1, 2] and journal.last("nothing") is None
    kept = path.read_bytes()
    said: list[str] = []
    with journals.opened(path, resume=False, notify=said.append) as journal:
        assert journal.entries == [] and journal.spent == 0.0 and path.read_bytes() == kept
        journal.add("done")
    assert len(said) == 1 and said[0].startswith("starting again: an unfinished tune of this profile is discarded")
    with journals.opened(path, resume=False, notify=said.append):
        assert len(said) == 1, "that one was finished"
    with journals.opened(path, resume=True, notify=said.append) as journal:
        assert [entry["kind"] for entry in journal.entries] == ["done"]
    path.write_bytes(path.read_bytes() + b"0000")
    with journals.opened(path, resume=True, notify=said.append) as journal:
        assert said[1:] == ["the last line of the journal is incomplete; its step is done again"]


@pytest.mark.parametrize("cut", range(1, 30))
def test_an_incomplete_last_line_loses_one_entry_at_most(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j.journal"
    with journals.opened(path, resume=False) as journal:
        journal.add("one", value=1)
        journal.add("two", value=2)
    complete = path.read_bytes()
    path.write_bytes(complete[:-cut])
    with journals.opened(path, resume=True) as journal:
        assert [entry["kind"] for entry in journal.entries] == ["one"]
        journal.add("two", value=2)
    assert path.read_bytes() == complete


def test_a_damaged_line_is_named_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.journal"
    with journals.opened(path, resume=False) as journal:
        for kind in ("one", "two", "three"):
            journal.add(kind)
    path.write_bytes(path.read_bytes().replace(b'"two"', b'"tow"'))
    with pytest.raises(UsageError, match="line 2 is damaged"), journals.opened(path, resume=True):
        pass


# -- drafters ----------------------------------------------------------------------------------------------------------


def test_drafters_are_in_the_grid_alone_and_with_lookups() -> None:
    drafters = [ProposerSpec("draft_model", {"model": f"/models/{name}.gguf"}) for name in ("one", "two")]
    provides = Requires(topk=1 << 30, drafter=True)
    without = grid(provides)
    settings = grid(provides, named=drafters)
    assert len({setting.name for setting in settings}) == len(settings)
    added = [setting for setting in settings if setting not in without]
    assert {setting.method for setting in added} == {
        "draft_model",
        "suffix + draft_model",
        "ngram + draft_model",
        "suffix + token_recycling + draft_model",
    }
    chains = {s.planner.max_nodes for s in added if s.method == "draft_model" and s.planner.mode == "static"}
    assert chains == {1, 2, 3, 4, 6, 8}
    assert sum("one.gguf" in setting.name for setting in added) == len(added) / 2
    pruned = [setting for setting in settings if setting.planner.prune_top_k is not None]
    assert {setting.planner.prune_top_k for setting in pruned} == {*PRUNED}
    assert {setting.method for setting in pruned} == {s.method for s in added} - {"draft_model"}


def test_a_model_drafts_for_itself_where_it_is_named() -> None:
    """The engine provides what it requires, and it has no option without a default."""
    provides = Requires(topk=1 << 30, drafter=True)
    assert not any("short_context" in setting.method for setting in grid(provides))
    spec = ProposerSpec("short_context")
    assert any(setting.method == "suffix + short_context" for setting in grid(provides, named=[spec]))


@pytest.mark.parametrize(
    ("length", "context", "tried"),
    [(8000, 9000, ["one.gguf", "short_context"]), (5000, 6000, ["one.gguf"]), (300, 600, ["one.gguf"])],
)
def test_long_texts_let_the_model_draft_for_itself(length: int, context: int, tried: list[str]) -> None:
    """From twice the tokens that it keeps, which are 2,624; unless it is named, and then in every context that has room
    for them."""
    answers = [Answer("a", 0, "x", int_array([1] * length), int_array([2, 3]), np.zeros((1, 1), np.int32))] * 3
    model, own = ProposerSpec("draft_model", {"model": "/m/one.gguf"}), ProposerSpec("short_context")
    found, said = drafters_to_try([model], [own], answers, context)
    assert [drafter_name(spec) for spec in found] == tried and not said
    named, said = drafters_to_try([ProposerSpec("short_context", {"recent": 256})], [own], answers, context)
    assert len(named) == (context > 2368) and len(said) == (context <= 2368)
    assert drafters_to_try([model], [], answers, context) == ([model], [])


def test_drafters_of_one_model_have_names_of_their_own() -> None:
    """So that two windows can be tried, and each of their notes says which one it is about."""
    windows = [
        ProposerSpec("short_context", options) for options in ({}, {"recent": 256}, {"recent": 256, "chunk": 64})
    ]
    names = [drafter_name(spec) for spec in windows]
    assert names == ["short_context", "short_context, recent 256", "short_context, recent 256, chunk 64"]
    _, said = drafters_to_try(windows, [], [], 600)
    assert len(set(said)) == 3


def test_a_window_with_chunks_is_read_once_and_then_its_recent_tokens() -> None:
    drafter, clock = recorded(window=Window(2, 4, 6, 2))
    followed(drafter, 0)
    assert drafter.reading_ms(0) == 2 + 6 + 4 - 1
    drafter.read([0], 1000.0)
    assert drafter.reading_ms(0) == 0 and clock() == 11e6


def recorded(**changes: Any) -> tuple[RecordedDrafter, SimulatedClock]:
    """A drafter of one answer 10 11 12 13 14 15, with wrong guesses for 12 and 15; a pass takes 2 ms for one sequence
    and 3 for two, reading a token 1 ms."""
    guesses = {("a", 0): Guesses(int_array([11, 99, 13, 14, 98]), int_array([0, 1, 0, 0, 1]))}
    trace = DrafterTrace((Bucket("sure", 0.9), Bucket("unsure", 0.2)), (2.0, 3.0), 1.0, 5.0, 8, guesses=guesses)
    clock = SimulatedClock()
    return RecordedDrafter(replace(trace, **changes), clock, Expense(), 1), clock


def followed(drafter: RecordedDrafter, *seqs: int, name: str = "a", prompt: int = 20) -> None:
    tokens = int_array([10, 11, 12, 13, 14, 15])
    for seq in seqs:
        drafter.follow(seq, Answer(name, 0, "", int_array([1] * prompt), tokens, np.zeros((5, 1), np.int32)))
        drafter.begin(seq, int_array([*[1] * prompt, 10]))


def emitted(drafter: RecordedDrafter, seq: int, *tokens: int) -> None:
    drafter.observe(seq, Step(list(tokens), EMPTY, []))


def test_a_recorded_drafter_drafts_its_guesses_in_the_time_that_they_took() -> None:
    drafter, clock = recorded()
    followed(drafter, 0)
    assert drafter.reading_ms(0) == 20.0
    assert drafter.propose(0, 3).tokens.tolist() == [11, 99, 13]
    assert (clock.now, drafter.passes) == (26_000_000, 3)
    emitted(drafter, 0, 11, 12)
    assert drafter.reading_ms(0) == 0.0
    draft = drafter.propose(0, 8)
    assert (draft.tokens.tolist(), draft.buckets.tolist()) == ([13, 14, 98], [0, 0, 1])
    for token in (13, 14):
        emitted(drafter, 0, token)
    drafter.read([0], 100.0)
    assert drafter.reading_ms(0) == 0.0


def test_a_recorded_drafter_judges_by_what_was_recorded() -> None:
    top = np.arange(15, dtype=np.int32).reshape(5, 3)
    known = Guesses(int_array([11, 99, 13, 14, 98]), int_array([0, 1, 0, 0, 1]), top, top / 100)
    drafter, _ = recorded(guesses={("a", 0): known})
    followed(drafter, 0)
    drafter.judged_top = 2
    assert drafter.knows(7) and not recorded(ids=int_array([11, 98]))[0].knows(7)
    assert drafter.likeliest(0) == [], "nothing was drafted"
    drafter.propose(0, 3)
    assert [one.tokens.tolist() for one in drafter.likeliest(0)] == [[0, 1], [3, 4], [6, 7]]
    assert drafter.likeliest(0)[1].probabilities.tolist() == [0.03, 0.04]
    emitted(drafter, 0, 11, 12)
    assert drafter.likeliest(0) == []
    drafter.propose(0, 0)
    assert drafter.likeliest(0) == []
    drafter.propose(0, 8)
    assert [one.tokens.tolist() for one in drafter.likeliest(0)] == [[6, 7], [9, 10], [12, 13]]


def test_a_recorded_drafter_without_probabilities_judges_nothing() -> None:
    drafter, _ = recorded()
    followed(drafter, 0)
    drafter.judged_top = 2
    assert len(drafter.propose(0, 3)) == 3 and drafter.likeliest(0) == []


def test_a_recorded_drafter_shares_passes_and_reads_in_pieces() -> None:
    drafter, clock = recorded()
    followed(drafter, 0, 1)
    drafter.read([0, 1], 30.0)
    assert (drafter.reading_ms(0), drafter.reading_ms(1)) == (0.0, 10.0) and clock.now == 30_000_000
    drafter.read([1], 10.0)
    drafts = drafter.propose_batch([0, 1], [1, 2])
    assert [draft.tokens.tolist() for draft in drafts] == [[11], [11, 99]]
    assert clock.now == 40_000_000 + 3_000_000 + 2_000_000


def test_a_recorded_drafter_with_a_window_reads_no_more_than_that() -> None:
    drafter, _ = recorded(window=Window(4, 8))
    followed(drafter, 0, prompt=100)
    assert drafter.reading_ms(0) == 4 + 8 - 1


def test_a_recorded_drafter_is_never_asked_for_an_answer_that_it_lacks() -> None:
    drafter, _ = recorded()
    followed(drafter, 0, name="b")
    assert drafter.reading_ms(0) > 1e9


def test_a_recorded_drafter_is_scored_on_emitted_tokens() -> None:
    drafter, clock = recorded()
    followed(drafter, 0)
    assert drafter.score(0) == (0, 0)
    emitted(drafter, 0, 11, 12, 13)
    assert drafter.score(0) == (2, 3)
    assert clock.now == 10_000_000


def test_a_recorded_drafter_learns_what_was_right() -> None:
    drafter, _ = recorded()
    learned = []

    class Advice:
        def another_pays(self, seq: int, chain: Sequence[int], rows: int) -> bool:
            return len(chain) < 3

        def learn(self, seq: int, right: int, tested: int) -> None:
            learned.append((right, tested))

    followed(drafter, 0)
    drafter.advice = Advice()
    assert len(drafter.propose(0, 8)) == 3
    emitted(drafter, 0, 11, 12)
    drafter.propose(0, 2)
    emitted(drafter, 0, 13)
    assert learned == [(1, 2), (1, 1)]
