"""Tuning a server, against a small server without a model: what is chosen, every fault as a row, resuming, refusals.

The stub's times are slept, so that whether drafts pay is known: a pass takes 3 ms, and a draft token what a test says.
"""

import json
import shlex
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from serving import free_port
from simulated_server import Machine

from specplug import profile as profiles
from specplug.bench.workloads import Prompt
from specplug.errors import SpecplugError, UsageError
from specplug.reports.server_tune_report import server_page
from specplug.subjects.server_command import read_command
from specplug.subjects.subject import Abilities, Question, SubjectError
from specplug.tune import journal as journals
from specplug.tune.server_flags import server_session
from specplug.tune.server_flags.server_candidates import ENGINE_NAME, PLAIN, PLAIN_NAME, Candidate
from specplug.tune.server_flags.server_document import server_next_step, server_rows, server_verdict
from specplug.tune.server_flags.server_request import ServerRequest, check_server_request
from specplug.tune.server_flags.server_session import ServerOutcome, tune_server
from specplug.tune.server_flags.successive_elimination import CandidateRun
from specplug.tune.tune_request import journal_path

STUB = Path(__file__).with_name("stub_server.py")

WRAPPER = """
import runpy, sys
sys.path.insert(0, {folder!r})
faults = {faults!r}
for word, added in faults.items():
    if word in sys.argv:
        sys.argv += added
runpy.run_path({stub!r}, run_name="__main__")
"""


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr("specplug.machine.hardware.too_busy", lambda: None)
    monkeypatch.setattr("specplug.tune.server_flags.successive_elimination.CONFIRMATION_ROUNDS", 1)


MakeRequest = Callable[..., ServerRequest]


@pytest.fixture
def request_for(tmp_path: Path) -> MakeRequest:
    """A request for the stub; `faults` are flags that it gets beside a word of its command line."""

    def made(*flags: str, faults: dict[str, list[str]] | None = None, **values: Any) -> ServerRequest:
        script = STUB
        if faults:
            script = tmp_path / "stub.py"
            script.write_text(WRAPPER.format(faults=faults, folder=str(STUB.parent), stub=str(STUB)))
        command = read_command(shlex.join([sys.executable, str(script), "-m", "stub.gguf", *flags]))
        words = "one two three four five six seven eight nine ten eleven twelve"
        prompts = [Prompt(f"q{i}", f"kind {i % 2}", (f"say {words} and {i}",)) for i in range(6)]
        asked = ServerRequest(command, None, prompts, "toy", "mine", tmp_path / "mine.yaml", budget=40.0, max_tokens=48)
        return replace(asked, **values)

    return made


def run(request: ServerRequest) -> tuple[ServerOutcome, list[str]]:
    notices: list[str] = []
    return tune_server(request, notify=notices.append), notices


def test_where_drafts_pay_the_flags_of_the_fastest_are_written(
    request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specplug.tune.server_flags.run_choice.MOST_RUN", 3)
    request = request_for("--ms-per-pass", "3")
    outcome, _ = run(request)
    document = outcome.document
    assert json.loads(json.dumps(document)) == document
    assert document["chosen"] != PLAIN_NAME and "--spec-type" in document["flags"]
    assert outcome.argv == [*request.command.argv, *document["flags"]], "the user's own words come first, untouched"
    (chosen,) = [row for row in document["rows"] if row["name"] == document["chosen"]]
    assert chosen["speedup"]["low"] > 1.0 and chosen["live"]["first_ms"]["p50"] > 0
    simple = [one for one in document["replay_agreement"] if one["name"].startswith("ngram-simple")]
    assert len(simple) == 7 and all(one["server"] == one["replay"] for one in simple)
    assert document["pass_ms"]["ms"][0] == pytest.approx(3.0, rel=0.02), "the stub sleeps 3 ms for a pass"
    assert max(document["pass_ms"]["ms"]) == pytest.approx(3.0, rel=0.02), "whatever it verifies"
    written = profiles.load(request.out)
    assert written.engine == "server" and written.server is not None
    assert written.server.argv == outcome.argv and written.evidence["chosen"] == document["chosen"]
    assert "times as fast as plain decoding" in server_verdict(document)
    assert document["chosen"] in server_page(document) and len(server_rows(document)) == len(document["rows"])


def test_where_drafts_never_pay_the_command_is_the_plain_one(
    request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specplug.tune.server_flags.run_choice.MOST_RUN", 2)
    request = request_for("--ms-per-pass", "2", "--ms-per-draft", "6")
    outcome, _ = run(request)
    assert outcome.document["chosen"] == PLAIN_NAME and outcome.argv == list(request.command.argv)
    assert outcome.document["flags"] == [] and "nothing was shown to be faster" in server_verdict(outcome.document)
    live = [row for row in outcome.document["rows"] if row.get("speedup")]
    assert live and all(row["state"] != "faster" for row in live)
    assert all(row["speedup"]["median"] < 1.0 for row in live if row["live"]["drafted"])
    written = profiles.load(request.out)
    assert written.server is not None and written.server.flags == ()


def test_a_fault_of_a_candidates_server_is_a_row_with_the_reason(
    request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_session, "SHORTEST_SILENCE_S", 1.0)
    monkeypatch.setattr(server_session, "SILENCE_SHARE", 0.0)
    request = request_for(
        *("--ms-per-pass", "1"),
        faults={
            "ngram-map-k": ["--die-at", "3"],
            "ngram-map-k4v": ["--hang-at", "3"],
            "ngram-mod": ["--fail-at", "3"],
            "ngram-cache": ["--missing-model"],
        },
    )
    outcome, notices = run(request)
    failed = {
        row["name"].split(" ")[0].rstrip(","): row["state"] for row in outcome.document["rows"] if "failure" in row
    }
    assert failed.keys() == {"ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache"}
    assert "ended" in failed["ngram-map-k"] and "it hangs" in failed["ngram-map-k4v"]
    assert "HTTP 500" in failed["ngram-mod"] and "ended with exit code 1" in failed["ngram-cache"]
    assert outcome.document["chosen"].startswith("ngram-simple")
    assert sum(" failed: " in notice for notice in notices) == 4


def test_a_fault_of_plain_decoding_ends_the_tune(request_for: MakeRequest) -> None:
    request = request_for("--missing-model")
    with pytest.raises(SpecplugError, match=r"plain decoding cannot be measured: .*ended with exit code"):
        run(request)
    assert not request.out.exists()


def test_an_interrupted_tune_is_continued(request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specplug.tune.server_flags.run_choice.MOST_RUN", 2)
    request = request_for("--ms-per-pass", "2")
    whole = CandidateRun.add
    measured = []

    def interrupted(self: CandidateRun, *values: Any) -> None:
        whole(self, *values)
        measured.append(self.candidate.name)
        if len(measured) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(CandidateRun, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(request)
    monkeypatch.setattr(CandidateRun, "add", whole)
    assert not request.out.exists()
    with journals.opened(journal_path(request.out), resume=True) as journal:
        before = {kind: journal.of(kind) for kind in ("answer", "cost", "pair")}
    assert len(before["answer"]) == 6 and len(before["pair"]) == 3 and before["cost"]
    outcome, _ = run(replace(request, resume=True))
    with journals.opened(journal_path(request.out), resume=True) as journal:
        assert {kind: journal.of(kind)[: len(kept)] for kind, kept in before.items()} == before
        assert len(journal.of("answer")) == 6 and len(journal.of("cost")) == len(before["cost"])
        pairs = journal.of("pair")
    first = before["pair"][0]["name"]
    row = next(row for row in outcome.document["rows"] if row["name"] == first)
    assert row["answers"] == len({tuple(pair["keys"]) for pair in pairs if pair["name"] == first})
    for other, message in (
        (replace(request, resume=True, max_tokens=32), "another max_tokens"),
        (request_for("--ms-per-pass", "9", resume=True), "another command"),
    ):
        with pytest.raises(UsageError, match=message):
            run(other)


def test_two_tunes_of_one_profile_do_not_run_at_once(request_for: MakeRequest) -> None:
    request = request_for()
    path = journal_path(request.out)
    path.parent.mkdir(parents=True)
    with FileLock(f"{path}.lock"), pytest.raises(UsageError, match="another tune of this profile is running"):
        run(request)


def test_a_command_with_a_port_of_its_own_runs_one_server_at_a_time(
    request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specplug.tune.server_flags.run_choice.MOST_RUN", 1)
    port = free_port()
    request = request_for("--ms-per-pass", "3", "--port", str(port))
    outcome, notices = run(request)
    assert any("one server runs at a time" in notice for notice in notices)
    assert outcome.document["chosen"] != PLAIN_NAME


def test_without_tokens_nothing_is_predicted_and_candidates_run_live(
    request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specplug.tune.server_flags.run_choice.MOST_RUN", 2)
    request = request_for("--ms-per-pass", "3", "--kind", "openai", concurrency=(1, 2))
    outcome, notices = run(request)
    document = outcome.document
    assert any("nothing is predicted by replay" in notice for notice in notices) and document["pass_ms"] is None
    assert all(row["predicted"] is None for row in document["rows"])
    assert document["levels"]["2"]["own"]["gap_ms"]["p99"] >= document["levels"]["2"]["own"]["gap_ms"]["p50"]


def test_requests_that_could_only_fail_are_refused(request_for: MakeRequest, tmp_path: Path) -> None:
    for values, message in (
        ({"max_tokens": 8}, "use --max-tokens 16 or more"),
        (
            {"concurrency": (2,)},
            "has prompts for 6 answers, and a winner needs 5 different groups of 2; pass --workload ",
        ),
        (
            {"concurrency": (1, 8)},
            "and --concurrency 8 asks 8 of them at once; pass --workload with 8 or more, or lower",
        ),
        (
            {"budget": 0.1},
            r"of 0.1 s is too small: .* 5 plain answers, .* take 0.4 s on the fastest machine; say --budget 30s",
        ),
        ({"out": tmp_path}, "this is not a file; use another --out"),
    ):
        with pytest.raises(UsageError, match=message):
            check_server_request(request_for(**values))
    with pytest.raises(UsageError, match=r"the command has --spec-type, .* leave out the flags that draft"):
        run(request_for("--spec-type", "ngram-mod"))


def test_a_budget_that_cannot_hold_one_candidate_names_one_that_can(request_for: MakeRequest) -> None:
    request = request_for("--ms-per-pass", "40", budget=2.0)
    with pytest.raises(UsageError, match=r"the budget of 2 s is too small: .* here; say --budget \d+s"):
        run(request)


def simulated(request: ServerRequest, machine: Machine) -> tuple[dict[str, Any], list[str]]:
    """The document and the notices of a tune with simulated servers."""
    notices: list[str] = []
    outcome = tune_server(request, notify=notices.append, opener=machine.opened, clock=machine.clock)
    return outcome.document, notices


def drafts_pay(name: str, process: int) -> float:
    return 1.0 if name in (PLAIN_NAME, ENGINE_NAME) else 0.5


def test_the_answers_that_a_winner_needs_are_recorded_whatever_their_share_of_the_budget(
    request_for: MakeRequest,
) -> None:
    document, _ = simulated(request_for(budget=80.0), Machine(lambda name, process: 4 * drafts_pay(name, process)))
    assert document["workload"]["answers"] == 5, "22% of 80 s has four answers of 4 s"
    prompts = [Prompt(str(i), "work", (f"say {i}",)) for i in range(30)]
    request = request_for(budget=60.0, concurrency=(4,), prompts=prompts, out=request_for().out.with_name("four.yaml"))
    document, _ = simulated(request, Machine(drafts_pay))
    assert document["workload"]["answers"] == 20, "five groups of four"


def test_a_budget_without_the_answers_of_a_winner_is_refused_after_the_first(request_for: MakeRequest) -> None:
    # a start of 2 s each, 5 answers of 3 s, and 5 with and without drafts: 49 s
    machine = Machine(lambda name, process: 3.0, start_s=2.0)
    with pytest.raises(UsageError, match=r"budget of 48 s is too small: .* take 49.0 s here; say --budget 150s"):
        simulated(request_for(budget=48.0), machine)
    assert machine.now == 5.0


def test_a_fault_of_specplugs_own_engine_is_a_row(request_for: MakeRequest, tmp_path: Path) -> None:
    (model := tmp_path / "model.gguf").write_bytes(b"model")
    too_long = UsageError("the prompt has 5000 tokens, and the context is 4096; use a larger --context")
    machine = Machine(drafts_pay, fault=lambda name: too_long if name == ENGINE_NAME else None)
    document, _ = simulated(request_for(budget=400.0, own_engine=True, model=model), machine)
    (row,) = [row for row in document["rows"] if row["name"] == ENGINE_NAME]
    assert row["state"] == f"failed: {too_long}" and document["chosen"] != PLAIN_NAME


def test_the_own_engine_is_given_up_before_the_candidates(request_for: MakeRequest, tmp_path: Path) -> None:
    (model := tmp_path / "model.gguf").write_bytes(b"model")
    # of 30 s, 6 are for recording and 3 would be for the engine; a first round of one candidate takes 10 s
    document, notices = simulated(
        request_for(budget=30.0, own_engine=True, model=model), machine := Machine(drafts_pay)
    )
    assert any("own engine is not measured" in notice for notice in notices) and ENGINE_NAME not in machine.started
    assert document["chosen"] != PLAIN_NAME and len(set(machine.started)) == 2, "one candidate has enough answers"


def test_the_own_engine_has_the_context_and_the_threads_of_the_command(request_for: MakeRequest) -> None:
    command = request_for("-c", "16384", "-np", "2", "-t", "3").command
    found = server_session.engine_profile(profiles.load("default"), command).runtime
    assert (found.context, found.threads) == (8192, 3)
    unchanged = profiles.load("default")
    assert server_session.engine_profile(unchanged, request_for().command) == unchanged


def test_a_failure_at_another_concurrency_is_not_one_of_the_deciding_one(request_for: MakeRequest) -> None:
    asked = request_for(budget=400.0, concurrency=(1, 2))
    machine = Machine(drafts_pay)

    def fault(name: str) -> SpecplugError | None:
        at_once = threading.current_thread() is not threading.main_thread()
        return SubjectError("out of memory") if at_once and name != PLAIN_NAME else None

    machine.fault = fault
    first, _ = simulated(asked, machine)
    assert first["levels"]["2"]["failure"] == "out of memory" and first["chosen"] != PLAIN_NAME
    again, _ = simulated(replace(asked, resume=True), machine)
    assert again["chosen"] == first["chosen"] and again["levels"]["2"]["failure"] == "out of memory"


def test_another_version_drafter_or_environment_is_not_continued(
    request_for: MakeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (drafter := tmp_path / "drafter.gguf").write_bytes(b"one")
    asked = request_for(budget=400.0, drafters=(str(drafter),))
    simulated(asked, Machine(drafts_pay, abilities=Abilities("vllm", version="0.32")))
    again = replace(asked, resume=True)
    with pytest.raises(UsageError, match=r"had version '0.32' of the server, and this is '0.33'; run without --resume"):
        simulated(again, Machine(drafts_pay, abilities=Abilities("vllm", version="0.33")))
    with monkeypatch.context() as changed:
        changed.setenv("LLAMA_ARG_CTX_SIZE", "512")
        with pytest.raises(UsageError, match="another environment"):
            simulated(again, Machine(drafts_pay))
    drafter.write_bytes(b"two")
    with pytest.raises(UsageError, match="another drafters"):
        simulated(again, Machine(drafts_pay))


def test_tokens_are_asked_for_when_recording_and_the_answers_without_are_counted(request_for: MakeRequest) -> None:
    machine = Machine(drafts_pay, abilities=Abilities("llama-server", token_ids=True))
    _, notices = simulated(request_for(budget=400.0), machine)
    asked = [question.ids for _, question in machine.questions].count(True)
    assert asked == 6 + 2 * 7, "the plain answers, and two for each of the probes"
    assert all(question.ids for _, question in machine.questions[:6])
    assert any("did not report the token ids of 1 of 6 answers" in notice for notice in notices)


def test_a_candidate_has_the_time_that_is_left_to_start_or_a_few_times_that_of_plain_decoding() -> None:
    assert server_session.start_limit(10.0, 300.0) == 40.0
    assert server_session.start_limit(1.0, 300.0) == 20.0, "a drafter may have to be read from the disk"
    assert server_session.start_limit(10.0, 15.0) == 15.0
    assert server_session.start_limit(10.0, 2.0) == 10.0


def test_a_candidate_that_does_not_start_is_given_up_after_that_time(request_for: MakeRequest) -> None:
    server = server_session._opener(request_for("--slow-start", "60"), lambda: 0.3, lambda: 60.0)(Candidate("c", "c"))
    with pytest.raises(SubjectError, match=r"within 0.3 s"):
        server.start()


def test_an_answer_may_take_what_is_left_and_a_silence_and_one_of_plain_decoding_the_budget() -> None:
    candidate, plain = Candidate("c", "c"), Candidate(PLAIN_NAME, PLAIN_NAME)
    assert server_session.answer_limit(candidate, 45.0, 200.0, 300.0) == 245.0
    assert server_session.answer_limit(candidate, 45.0, 30.0, 300.0) == 75.0, "not 45: it began in time"
    assert server_session.answer_limit(candidate, 45.0, -1.0, 300.0) == 45.0
    assert server_session.answer_limit(plain, 45.0, -1.0, 300.0) == 345.0


def test_a_slow_answer_of_plain_decoding_at_the_end_of_the_budget_does_not_end_the_tune(
    request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """75 tokens of 20 ms take 1.5 s, more than the silence of 1 s, when nothing is left."""
    monkeypatch.setattr(server_session, "SHORTEST_SILENCE_S", 1.0)
    monkeypatch.setattr(server_session, "SILENCE_SHARE", 0.0)
    request = request_for("--ms-per-pass", "20")
    server = server_session._opener(request, lambda: 60.0, lambda: -1.0)(PLAIN)
    try:
        server.start()
        assert server.ask(Question([{"role": "user", "content": "a b c"}], 76)).tokens == 76
    finally:
        server.stop()


def test_an_answer_of_a_candidate_takes_no_longer_than_what_is_left_and_a_silence(
    request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token every 20 ms, so 1000 take 20 s, and no silence between them takes 1 s."""
    monkeypatch.setattr(server_session, "SHORTEST_SILENCE_S", 1.0)
    left = [60.0]
    request = request_for("--ms-per-pass", "20", budget=1.0)
    server = server_session._opener(request, lambda: 60.0, lambda: left[0])(Candidate("c", "c"))
    try:
        server.start()
        question = Question([{"role": "user", "content": "a b c"}], 30)
        assert server.ask(question).tokens == 30, "0.6 s of the 60 s that are left"
        left[0] = -1.0
        with pytest.raises(SubjectError, match=r"did not complete its answer within 1 s"):
            server.ask(replace(question, max_tokens=1000))
    finally:
        server.stop()


def test_a_row_says_why_it_did_not_win(request_for: MakeRequest) -> None:
    times = {PLAIN_NAME: 1.0, "ngram-simple": 0.5, "ngram-mod": 1.2}
    machine = Machine(lambda name, process: next((times[one] for one in times if name.startswith(one)), 0.8))
    document, _ = simulated(request_for(budget=1000.0), machine)
    states = {row["name"].split(" ")[0].rstrip(","): row["state"] for row in document["rows"] if "answers" in row}
    assert states["ngram-simple"] == "faster" and states["ngram-mod"] == "not faster"
    assert states["ngram-map-k"] == "slower than another one"
    assert "raise --budget" not in server_next_step(document)
    # 5 of 55 s are for recording; the selection has 25 s, in which the first candidate gets two groups of 12.5 s, and
    # nothing is left for another one. The confirmation has 25 s, for two groups
    slow = Machine(lambda name, process: 1.0 if name == PLAIN_NAME else 11.5)
    short, _ = simulated(request_for(budget=55.0, prompts=request_for().prompts[:5]), slow)
    rows = sorted(row["state"] for row in short["rows"] if "answers" in row)
    assert rows == ["no time to run it", "too few different answers: 2, 5 are needed"]
    assert "No candidate has the 5 answers that a winner needs; raise --budget" in server_next_step(short)


def test_a_confirmation_asks_what_was_not_recorded_first(
    request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specplug.tune.server_flags.run_choice.MOST_RUN", 1)
    prompts = [Prompt(str(i), "work", (f"say {i}",)) for i in range(24)]
    # 22% of 60 s hold 13 answers of 1 s; one candidate needs no selection, so it has none of them before
    machine = Machine(drafts_pay)
    document, _ = simulated(request_for(budget=60.0, prompts=prompts), machine)
    (row,) = [row for row in document["rows"] if row.get("speedup")]
    assert document["workload"]["answers"] == 13 and row["answers"] == 24, "the others were never recorded"


def test_a_confirmation_goes_on_where_it_was_interrupted(
    request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specplug.tune.server_flags.run_choice.MOST_RUN", 2)

    def slower_later(name: str, process: int) -> float:
        return 1.0 if name == PLAIN_NAME else (0.5, 0.8)[min(process, 1)]

    asked = request_for(budget=400.0)
    first, _ = simulated(asked, Machine(slower_later))
    again, _ = simulated(replace(asked, resume=True), machine := Machine(slower_later))
    chosen = [next(row for row in one["rows"] if row["name"] == one["chosen"]) for one in (first, again)]
    assert [row["speedup"]["median"] for row in chosen] == [1.25, 1.25], "the selection's 2.0 does not count"
    assert first["chosen"] not in machine.started, "nothing is measured again"


def too_long(*words: str) -> Callable[[str, Question], bool]:
    """Every server refuses questions whose last message ends in one of these words."""
    return lambda name, question: question.messages[-1]["content"].rpartition(" ")[2] in words


def test_a_prompt_that_the_server_refuses_is_left_out(request_for: MakeRequest) -> None:
    prompts = [
        Prompt("a", "work", ("say 1", "and huge", "say 2")),
        *(Prompt(f"b{i}", "work", (f"say {i}",)) for i in range(5)),
    ]
    machine = Machine(drafts_pay, refuses=too_long("huge"))
    document, notices = simulated(request_for(budget=400.0, prompts=prompts), machine)
    assert document["chosen"] != PLAIN_NAME and document["workload"]["answers"] == 6
    assert notices.count("without a/1: none: the prompt is too long") == 1
    asked = {question.messages[-1]["content"] for _, question in machine.questions}
    assert asked == {f"say {i}" for i in range(5)}, "the turn after the refused one needs its answer"
    again, notices = simulated(request_for(budget=400.0, prompts=prompts, resume=True), Machine(drafts_pay))
    assert again["workload"]["answers"] == 6 and notices.count("without a/1: none: the prompt is too long") == 1


def test_a_prompt_that_a_real_server_refuses_is_left_out(
    request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specplug.tune.server_flags.run_choice.MOST_RUN", 1)
    outcome, notices = run(request_for("--ms-per-pass", "2", "--refused-word", "and 5"))
    assert outcome.document["workload"]["answers"] == 5 and outcome.document["chosen"] != PLAIN_NAME
    (notice,) = [notice for notice in notices if notice.startswith("without q5/0: ")]
    assert "HTTP 400: request (5000 tokens) exceeds the available context size" in notice


def test_a_further_prompt_that_the_server_refuses_is_left_out(request_for: MakeRequest) -> None:
    prompts = [*(Prompt(f"b{i}", "work", (f"say {i}",)) for i in range(14)), Prompt("z", "work", ("so huge",))]
    machine = Machine(drafts_pay, refuses=too_long("huge"))
    document, notices = simulated(request_for(budget=60.0, prompts=prompts), machine)
    assert document["workload"]["answers"] == 13, "22% of 60 s hold 13 answers of 1 s, so z was not recorded"
    assert [question.messages[-1]["content"] for name, question in machine.questions].count("so huge") == 0
    assert notices.count("without z/0: none: the prompt is too long") == 1
    assert document["chosen"] != PLAIN_NAME and not any("failure" in row for row in document["rows"])


def test_where_too_few_prompts_are_answered_the_tune_ends_with_the_reason(request_for: MakeRequest) -> None:
    machine = Machine(drafts_pay, refuses=too_long("0", "1"))
    with pytest.raises(
        SpecplugError,
        match=r"4 questions were answered, and 5 are needed; of 2 that were refused, the last: .* is too long",
    ):
        simulated(request_for(), machine)


def test_where_two_servers_do_not_fit_together_the_tune_goes_on_with_one(request_for: MakeRequest) -> None:
    document, notices = simulated(request_for(budget=400.0), Machine(drafts_pay, most=1))
    assert document["chosen"] != PLAIN_NAME and not any("failure" in row for row in document["rows"])
    assert sum("one server runs at a time from here on" in notice for notice in notices) == 1


@pytest.mark.parametrize(
    ("flags", "fitted"),
    [
        ("-ngl auto", "-ngl and -c"),
        ("-ngl auto -c 512", "-ngl"),
        ("-ngl 99", "-c"),
        ("-ngl 99 -c 512", ""),
        ("-ngl auto -fit off", ""),
        ("-ngl 0", ""),
        ("", ""),  # a build that lists no devices, and is not asked to use one
    ],
)
def test_a_server_that_adapts_itself_to_the_gpu_memory_that_is_left_runs_alone(
    request_for: MakeRequest, flags: str, fitted: str
) -> None:
    notes: list[str] = []
    assert server_session._together(request_for(*flags.split()), notes.append) is (not fitted)
    advice = " and ".join(f"{flag} N" for flag in fitted.split(" and "))
    assert notes == [
        f"one server runs at a time: a second one would choose {fitted} by the GPU memory that is left (--fit); for "
        f"two side by side, use -fit off, or give {advice}"
    ] * bool(fitted)


def test_the_own_engine_computes_where_the_server_does(request_for: MakeRequest, tmp_path: Path) -> None:
    def layers(*flags: str) -> int:
        return server_session.engine_profile(profiles.load("default"), request_for(*flags).command).runtime.gpu_layers

    assert [layers(), layers("-ngl", "0"), layers("-ngl", "20"), layers("-ngl", "all")] == [0, 0, 20, -1]
    assert layers("-ngl", "99", "--device", "none") == 0


def test_the_own_engine_is_left_out_where_it_would_compute_on_the_processor_alone(
    request_for: MakeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pytest.importorskip("specplug.engines.llama_cpp.engine_settings")
    (model := tmp_path / "model.gguf").write_bytes(b"model")
    asked = request_for("-ngl", "99", budget=400.0, own_engine=True, model=model)
    for able in (False, True):
        monkeypatch.setattr(settings, "can_offload", lambda able=able: able)
        document, notices = simulated(asked, machine := Machine(drafts_pay))
        assert any(row["name"] == ENGINE_NAME for row in document["rows"]) is able
        assert any("built without GPU support" in notice for notice in notices) is not able
        assert (ENGINE_NAME in machine.started) is able


def without_lookup(request: ServerRequest) -> ServerRequest:
    """The request for a build of llama-server without --spec-type."""
    assert request.command.help is not None
    help_text = replace(request.command.help, spec_types=())
    return replace(request, command=replace(request.command, help=help_text))


def test_where_there_is_nothing_to_try_nothing_is_measured(request_for: MakeRequest) -> None:
    machine = Machine(drafts_pay)
    with pytest.raises(UsageError, match=r"nothing to try: this .* has no lookup .* or pass --draft MODEL.gguf"):
        simulated(without_lookup(request_for()), machine)
    with pytest.raises(UsageError, match=r"the command has -md, which drafts, so plain decoding cannot be measured"):
        simulated(without_lookup(request_for("-md", "d.gguf")), machine)
    with pytest.raises(UsageError) as refused:
        simulated(without_lookup(request_for(heads=(("mtp", None),))), machine)
    assert str(refused.value).endswith("or pass --draft MODEL.gguf; draft-mtp: this build has no such --spec-type")
    assert machine.started == []


def test_an_interval_of_few_answers_is_not_shown(request_for: MakeRequest) -> None:
    document, _ = simulated(request_for(budget=400.0, concurrency=(1, 2)), Machine(drafts_pay))
    (row,) = [row for row in document["rows"] if row["name"] == document["chosen"]]
    assert [kind["answers"] for kind in row["categories"].values()] == [3, 3]
    assert document["levels"]["2"]["answers"] == 3, "six prompts, two at once"
    for kind in row["categories"].values():
        kind |= {"low": 1.9, "high": 2.1}
    document["levels"]["2"]["speedup"] |= {"low": 1.9, "high": 2.1}
    assert "1.90-2.10" not in server_page(document)
    next(iter(row["categories"].values()))["answers"] = 5
    assert server_page(document).count("1.90-2.10") == 1
