"""Live runs of a server's candidates: what is dropped, what wins, and what is begun in the time that is left.

The servers are simulated: an answer has 100 tokens and takes as long as a test says, on a clock that a test reads.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from simulated_server import Machine

from specplug.bench.statistics import expanded_tail
from specplug.subjects.subject import Question, RefusedQuestion
from specplug.tune.server_flags.live_servers import LiveServers
from specplug.tune.server_flags.recorded_questions import AskedQuestion, Timed
from specplug.tune.server_flags.run_choice import to_run
from specplug.tune.server_flags.server_candidates import PLAIN_NAME, Candidate
from specplug.tune.server_flags.successive_elimination import CandidateRun, SuccessiveElimination, drop, leader_of


def groups(count: int) -> list[list[AskedQuestion]]:
    return [
        [AskedQuestion(f"q{i}/0", "work", Question(({"role": "user", "content": str(i)},), 128))] for i in range(count)
    ]


def elimination(machine: Machine, count: int, *, budget: float = 1e6, together: bool = True) -> SuccessiveElimination:
    """Of `count` groups of one answer, each of which is thought to take 1 s."""
    servers = LiveServers(machine.opened, together=together)
    return SuccessiveElimination(
        servers, groups(count), left=lambda: budget - machine.now, start_s=machine.start_s, group_s=2.0
    )


def measured(name: str, speedups: Sequence[float]) -> CandidateRun:
    """A run with one group for each speedup: plain decoding takes 1.2 s, it the corresponding time."""
    found = CandidateRun(Candidate(name, name))
    add(found, speedups)
    return found


def add(run: CandidateRun, speedups: Sequence[float]) -> None:
    for group, speedup in zip(groups(len(speedups)), speedups, strict=True):
        run.add(group, [Timed(100, 1200 / speedup, 0.0)], [Timed(100, 1200.0, 0.0)])


def test_what_lies_below_the_leader_or_below_plain_decoding_is_dropped() -> None:
    fast, slower, slow = measured("fast", [1.5] * 5), measured("slower", [1.2] * 5), measured("slow", [0.8] * 5)
    wide = measured("wide", [1.0, 1.0, 1.2, 2.0, 2.0])
    drop([fast, slower, slow, wide])
    assert fast.dropped is None and wide.dropped is None, "its interval reaches from 1 to 2"
    assert slower.dropped == "slower than another one" and slow.dropped == "slower than plain decoding"


def test_one_answer_leads_nobody() -> None:
    lucky, steady = measured("lucky", [3.0]), measured("steady", [1.5] * 5)
    drop([lucky, steady])
    assert lucky.dropped is None and steady.dropped is None
    assert leader_of([lucky, steady]) is steady


def test_live_answers_and_the_prediction_count_by_their_certainty() -> None:
    # Of 10 answers with 1.3 and 10 with 1.1, the interval is about 1.16 to 1.23: a deviation of 0.015 in the logarithm.
    # The prediction's is 0.043, so that it has a weight of about a ninth.
    sure = measured("sure", [1.3, 1.1] * 10)
    sure.predicted = 1.5
    assert sure.speedup is not None
    assert 1.19 < sure.median < 1.20 and sure.median < sure.expected < sure.median * (1.5 / sure.median) ** 0.2
    unsure = measured("unsure", [0.8, 0.9, 1.0, 1.6, 2.0])
    unsure.predicted = 1.5
    assert 1.4 < unsure.expected < 1.5
    alone, unseen = measured("alone", [1.2, 1.3] * 3), CandidateRun(Candidate("unseen", "x"), predicted=1.7)
    assert (alone.expected, unseen.expected) == (alone.median, 1.7)
    assert leader_of([sure, unsure]) is unsure, "though its live answers are slower"


def test_the_best_three_go_on() -> None:
    runs = [measured(str(one), [1.0, 1.0, one, 3.0, 3.0]) for one in (1.1, 1.2, 1.3, 1.4)]
    drop(runs)
    assert [one.dropped for one in runs] == ["not among the best 3 of the selection", None, None, None]


def test_only_the_answers_of_the_confirmation_decide() -> None:
    run = measured("one", [2.0] * 5)
    assert [run.wins, run.median] == [False, 2.0], "it was not confirmed"
    run.begin_confirmation()
    add(run, [1.0] * 5)
    assert [run.wins, run.median] == [False, 1.0]
    confirmed = measured("two", [2.0] * 5)
    confirmed.begin_confirmation()
    add(confirmed, [1.2] * 4)
    assert not confirmed.wins, "four answers are too few"
    add(confirmed, [1.2] * 5)
    assert [confirmed.wins, confirmed.median] == [True, pytest.approx(1.2)]
    confirmed.dropped = "slower than another one"
    assert [confirmed.wins, confirmed.running] == [False, False]


def test_five_answers_of_which_one_is_slower_are_no_proof() -> None:
    # a resample has four or five times the slow answer, hence a ratio below 1, in 0.7% of cases; the tail is 0.1%
    one = measured("one", [])
    one.begin_confirmation()
    add(one, [0.97, 1.1, 1.1, 1.1, 1.1])
    assert one.speedup is not None and one.speedup.low < 1.0 and not one.wins


def test_a_candidate_that_was_fast_by_chance_does_not_win() -> None:
    times = {"lucky": [0.5, 1.0, 1.0], "steady": [0.9, 0.9]}
    machine = Machine(lambda name, process: 1.0 if name == PLAIN_NAME else times[name][process])
    runs = [CandidateRun(Candidate(name, name)) for name in times]
    elimination(machine, 6).run(runs)
    lucky, steady = runs
    assert steady.dropped == "slower than another one" and steady.speedup is not None
    assert lucky.pairs.speedup().median == 2.0  # type: ignore[union-attr]
    assert lucky.median == 1.0 and not lucky.wins


def test_the_fastest_is_confirmed_and_wins() -> None:
    machine = Machine(lambda name, process: {PLAIN_NAME: 1.0, "a": 0.8, "b": 0.5}[name])
    runs = [CandidateRun(Candidate(name, name)) for name in "ab"]
    elimination(machine, 6).run(runs)
    assert [one.wins for one in runs] == [False, True] and runs[1].median == 2.0
    assert len(runs[1].pairs.groups) == 5 and len(runs[1].confirmation.groups) == 6  # type: ignore[union-attr]


def test_among_candidates_as_fast_as_plain_decoding_one_wins_in_three_of_a_hundred_tunes() -> None:
    noise = np.random.default_rng(3)
    machine = Machine(lambda name, process: 1 + 0.05 * float(noise.standard_normal()))
    wins = 0
    for _ in range(60):
        runs = [CandidateRun(Candidate(str(i), str(i))) for i in range(8)]
        elimination(machine, 10).run(runs)
        wins += any(one.wins for one in runs)
    assert wins <= 4


def test_the_tail_of_an_interval_of_few_values_is_smaller() -> None:
    # Student's t: 2.776 for 5 values, 2.045 for 30; times sqrt(n / (n - 1)): 3.104 and 2.080; normal tails of these
    assert expanded_tail(5) == pytest.approx(0.00096, abs=0.00006)
    assert expanded_tail(30) == pytest.approx(0.01877, abs=0.00005)
    assert expanded_tail(100_000) == pytest.approx(0.025, abs=1e-5) and expanded_tail(1) == 0.025


def test_one_server_at_a_time_is_asked_in_both_orders() -> None:
    asked: list[str] = []

    def slower_each_time(name: str, process: int) -> float:
        asked.append(name)
        return 1 + 0.1 * (len(asked) - 1)

    run = CandidateRun(Candidate("c", "c"))
    elimination(Machine(slower_each_time), 4, together=False).measure(run, groups(4))
    assert asked == ["c", "c", *[PLAIN_NAME] * 4, "c", "c"]
    own, plain, *_ = (sum(one.ms for one in side) for side in (run.own, run.plain))
    assert own == pytest.approx(plain), "1 + 1.1 + 1.6 + 1.7 = 1.2 + 1.3 + 1.4 + 1.5"


@pytest.mark.parametrize(
    ("budget", "starts", "answers"),
    [
        (21.9, [], 0),  # a candidate and plain decoding: two starts of 10 s and two answers of 1 s
        (22.0, ["c", PLAIN_NAME], 1),
        (24.0, ["c", PLAIN_NAME], 2),
        (36.0, ["c", PLAIN_NAME, "c"], 3),  # 10 + 2, 10 + 3, 10 + 1
        (38.0, ["c", PLAIN_NAME, "c"], 4),
    ],
)
def test_one_server_at_a_time_keeps_the_budget(budget: float, starts: list[str], answers: int) -> None:
    machine = Machine(lambda name, process: 1.0, start_s=10.0)
    run = CandidateRun(Candidate("c", "c"))
    elimination(machine, 4, budget=budget, together=False).measure(run, groups(4))
    assert machine.started == starts and run.groups == answers and machine.now <= budget


def test_answers_that_take_longer_than_was_thought_are_counted() -> None:
    machine = Machine(lambda name, process: 10.0)  # thought to be 1 s
    run = CandidateRun(Candidate("c", "c"))
    elimination(machine, 9, budget=60.0, together=False).measure(run, groups(9))
    assert run.groups == 3 and machine.now == 60.0


def test_no_server_is_started_for_which_there_is_no_time() -> None:
    machine = Machine(lambda name, process: 1.0, start_s=10.0)
    elimination(machine, 4, budget=11.9).measure(CandidateRun(Candidate("c", "c")), groups(4))
    assert machine.started == []


def test_half_of_the_time_is_kept_for_the_confirmation() -> None:
    machine = Machine(lambda name, process: 1.0 if name == PLAIN_NAME else 0.9)
    runs = [CandidateRun(Candidate(str(i), str(i))) for i in range(4)]
    elimination(machine, 5, budget=60.0).run(runs)
    # a group takes 1.9 s, and the last one may end at 30 s: 15 groups of the four, then 5 or more of the confirmation
    assert sum(len(one.pairs.groups) for one in runs) == 15
    assert [one.wins for one in runs].count(True) == 1


def test_where_there_is_time_for_less_than_two_candidates_one_is_run() -> None:
    tried = [Candidate(name, name) for name in "abc"]
    assert [len(to_run(tried, {}, most)) for most in (0, 1, 2, 9)] == [1, 1, 2, 3]


def test_a_slow_candidate_does_not_take_the_time_of_others() -> None:
    machine = Machine(lambda name, process: 10.0 if name == "slow" else 1.0)
    tried = elimination(machine, 9, budget=32.0, together=True)
    slow, quick = CandidateRun(Candidate("slow", "c")), CandidateRun(Candidate("quick", "c"))
    tried.measure(slow, groups(2))
    assert machine.now == 22.0
    tried.measure(quick, groups(9))
    assert quick.groups == 5, "10 s hold five groups of 2 s"


def test_a_candidate_that_does_not_start_beside_the_plain_server_is_measured_without_it() -> None:
    notes: list[str] = []
    machine = Machine(lambda name, process: 1.0 if name == PLAIN_NAME else 0.5, most=1)
    servers = LiveServers(machine.opened, together=True, note=notes.append)
    servers.plain()
    run = CandidateRun(Candidate("c", "c"))
    SuccessiveElimination(servers, groups(4), left=lambda: 1e6, start_s=0.0, group_s=2.0).measure(run, groups(4))
    assert run.failure is None and run.groups == 4 and run.median == 2.0
    assert notes == ["one server runs at a time from here on: c did not start beside the plain one"]
    assert not servers.together and machine.running.count("c") == 0


@pytest.mark.parametrize(("budget", "answers"), [(51.9, 0), (52.0, 1)])
def test_the_start_that_shows_that_two_servers_do_not_fit_is_not_what_a_start_takes(
    budget: float, answers: int
) -> None:
    # Starts of 10 s: the plain server, the candidate beside it, and alone. Then one server at a time has to start and
    # answer, of either kind: 2 * (10 + 1) s
    machine = Machine(lambda name, process: 1.0, start_s=10.0, most=1)
    servers = LiveServers(machine.opened, together=True)
    servers.plain()
    run = CandidateRun(Candidate("c", "c"))
    SuccessiveElimination(servers, groups(1), left=lambda: budget - machine.now, start_s=10.0, group_s=2.0).measure(
        run, groups(1)
    )
    assert run.failure is None and run.groups == answers
    assert machine.started == [PLAIN_NAME, "c", "c", *["c", PLAIN_NAME] * answers]


def test_a_candidate_that_does_not_start_alone_either_has_failed_and_the_next_one_runs_beside_the_plain_server() -> (
    None
):
    notes: list[str] = []
    machine = Machine(lambda name, process: 1.0, broken=frozenset({"c"}))
    servers = LiveServers(machine.opened, together=True, note=notes.append)
    servers.plain()
    both = SuccessiveElimination(servers, groups(4), left=lambda: 1e6, start_s=0.0, group_s=2.0)
    both.measure(broken := CandidateRun(Candidate("c", "c")), groups(4))
    assert broken.failure == "c: out of memory" and machine.started == [PLAIN_NAME, "c", "c", PLAIN_NAME]
    both.measure(sound := CandidateRun(Candidate("d", "d")), groups(4))
    assert servers.together and notes == [] and sound.groups == 4 and machine.started[4:] == ["d"]


def refusing(names: str, number: int) -> Machine:
    """The servers with these names refuse the question with this number."""
    return Machine(
        lambda name, process: 1.0 if name == PLAIN_NAME else 0.5,
        refuses=lambda name, question: name in names.split() and question.messages[0]["content"] == str(number),
    )


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("names", [PLAIN_NAME, f"{PLAIN_NAME} c"])
def test_a_question_that_plain_decoding_refuses_is_left_out(names: str, number: int, together: bool) -> None:
    machine, left_out = refusing(names, number), []

    def refused(group: Sequence[AskedQuestion], error: RefusedQuestion) -> None:
        left_out.append((group[0].key, str(error)))

    servers = LiveServers(machine.opened, together=together)
    runs = [CandidateRun(Candidate("c", "c"))]
    SuccessiveElimination(servers, groups(7), left=lambda: 1e6, start_s=0.0, group_s=2.0, refused=refused).run(runs)
    assert left_out == [(f"q{number}/0", f"{PLAIN_NAME}: the prompt is too long")], "once"
    assert runs[0].failure is None and runs[0].wins
    assert set(runs[0].confirmation.groups) == {f"q{i}/0" for i in range(7) if i != number}  # type: ignore[union-attr]
    assert runs[0].groups == 12, "two rounds of six"


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_candidate_that_refuses_what_plain_decoding_answers_has_failed(number: int, together: bool) -> None:
    run = CandidateRun(Candidate("c", "c"))
    elimination(refusing("c", number), 4, together=together).measure(run, groups(4))
    assert run.failure == "c: the prompt is too long"


def test_in_a_selection_refused_questions_take_no_candidates_turn() -> None:
    machine = refusing(f"{PLAIN_NAME} a b", 0)
    runs = [CandidateRun(Candidate(name, name)) for name in "ab"]
    elimination(machine, 6).run(runs)
    assert [one.failure for one in runs] == [None, None] and any(one.wins for one in runs)
    assert all("q0/0" not in one.pairs.groups for one in runs)


def test_a_selection_goes_on_with_those_for_which_there_is_time() -> None:
    machine = Machine(lambda name, process: 10.0 if name == "slow" else 1.0)
    tried = elimination(machine, 9, budget=54.0, together=True)
    slow, quick = CandidateRun(Candidate("slow", "c"), 2.0), CandidateRun(Candidate("quick", "c"), 1.0)
    tried.run([slow, quick])
    # of 54 s the selection has 13.5, as both have a prediction: one group of 11 s, and then one of 2 s
    assert len(slow.pairs.groups) == 1 and len(quick.pairs.groups) == 1
