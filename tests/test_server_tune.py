"""Tuning a server, against a small server without a model: what is chosen, every fault as a row, resuming, refusals.

The stub's times are slept, so that whether drafts pay is known: a pass takes 3 ms, and a draft token what a test says.
"""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from specplug import profile as profiles
from specplug.bench.workloads import Prompt
from specplug.errors import SpecplugError, UsageError
from specplug.reports.server_tune_report import server_page
from specplug.subjects.server_command import read_command
from specplug.tune import journal as journals
from specplug.tune.server_flags import server_session
from specplug.tune.server_flags.race import Racer
from specplug.tune.server_flags.server_candidates import PLAIN_NAME
from specplug.tune.server_flags.server_document import server_rows, server_verdict
from specplug.tune.server_flags.server_request import ServerRequest, check_server_request
from specplug.tune.server_flags.server_session import ServerOutcome, tune_server
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
    monkeypatch.setattr("specplug.tune.server_flags.race.CONFIRMATION_ROUNDS", 1)


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
    monkeypatch.setattr("specplug.tune.server_flags.racer_choice.MOST_RUN", 3)
    request = request_for("--ms-per-pass", "3")
    outcome, _ = run(request)
    document = outcome.document
    assert json.loads(json.dumps(document)) == document
    assert document["chosen"] != PLAIN_NAME and "--spec-type" in document["flags"]
    assert outcome.argv == [*request.command.argv, *document["flags"]], "the user's own words come first, untouched"
    (chosen,) = [row for row in document["rows"] if row["name"] == document["chosen"]]
    assert chosen["speedup"]["low"] > 1.0 and chosen["live"]["first_ms"]["p50"] > 0
    simple = [one for one in document["replay_agreement"] if one["name"].startswith("ngram-simple")]
    assert len(simple) == 4 and all(one["server"] == one["replay"] for one in simple)
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
    monkeypatch.setattr("specplug.tune.server_flags.racer_choice.MOST_RUN", 2)
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
    monkeypatch.setattr("specplug.tune.server_flags.racer_choice.MOST_RUN", 2)
    request = request_for("--ms-per-pass", "2")
    whole = Racer.add
    measured = []

    def interrupted(self: Racer, *values: Any) -> None:
        whole(self, *values)
        measured.append(self.candidate.name)
        if len(measured) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Racer, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(request)
    monkeypatch.setattr(Racer, "add", whole)
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
    import socket

    monkeypatch.setattr("specplug.tune.server_flags.racer_choice.MOST_RUN", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    request = request_for("--ms-per-pass", "3", "--port", str(port))
    outcome, notices = run(request)
    assert any("one server runs at a time" in notice for notice in notices)
    assert outcome.document["chosen"] != PLAIN_NAME


def test_without_tokens_nothing_is_predicted_and_candidates_run_live(
    request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specplug.tune.server_flags.racer_choice.MOST_RUN", 2)
    request = request_for("--ms-per-pass", "3", "--kind", "openai", concurrency=(1, 2))
    outcome, notices = run(request)
    document = outcome.document
    assert any("nothing is predicted by replay" in notice for notice in notices) and document["pass_ms"] is None
    assert all(row["predicted"] is None for row in document["rows"])
    assert document["levels"]["2"]["own"]["gap_ms"]["p99"] >= document["levels"]["2"]["own"]["gap_ms"]["p50"]


def test_requests_that_could_only_fail_are_refused(request_for: MakeRequest, tmp_path: Path) -> None:
    for values, message in (
        ({"max_tokens": 8}, "use --max-tokens 16 or more"),
        ({"concurrency": (8,)}, "has 6 prompts; add prompts, or lower --concurrency"),
        ({"budget": 0.1}, r"the budget of 0.1 s is too small: .* take 0.4 s on the fastest machine; say --budget 30s"),
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
