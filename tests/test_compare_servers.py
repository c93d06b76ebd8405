"""`bench --server`: processes of the stub server, whose timings are exactly what their flags ask for."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from subject_stubs import COMMAND, LOOKUP, running
from test_models import write_gguf

from specplug.bench import arms as engine_arms
from specplug.bench.compare_servers import compare_servers, names_apart, rounds_of
from specplug.bench.subject_arms import EngineArm, decode_seconds
from specplug.bench.workloads import Prompt
from specplug.errors import SpecplugError, UsageError
from specplug.subjects.clock_check import clock_difference
from specplug.subjects.opening import open_subject
from specplug.subjects.subject import Abilities, Question, RefusedQuestion, Reply, SubjectError
from specplug_cli.main import app

TOKENS = 24
"""New tokens of each answer. The first one is read with the prompt, so 23 are decoded."""


@pytest.fixture
def work(tmp_path: Path) -> str:
    """Four answers: a conversation of two turns, and one prompt of each category."""
    lines = [
        {"id": "a", "category": "chat", "turns": ["one two three four five", "six seven eight nine ten"]},
        {"id": "b", "category": "chat", "prompt": "red green blue yellow white black"},
        {"id": "c", "category": "code", "prompt": "alpha beta gamma delta epsilon zeta"},
    ]
    path = tmp_path / "work.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def bench(work: str, servers: Sequence[str], *more: str) -> Result:
    words = [word for server in servers for word in ("--server", server)]
    return CliRunner().invoke(app, ["bench", *words, "--workload", work, "--max-tokens", str(TOKENS), *more])


def compared(work: str, servers: Sequence[str], *more: str) -> dict[str, Any]:
    """The document of a run that succeeds."""
    done = bench(work, servers, *more, "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_server_whose_own_times_are_not_those_of_its_streams_is_named(work: str) -> None:
    done = bench(work, [f"{COMMAND} --ms-per-pass 8 --clock-rate 0.5"])
    assert done.exit_code == 0 and "compare them with care" in done.stderr


@pytest.mark.parametrize(("stream_ms", "named"), [(1000.0, False), (1090.0, False), (1120.0, True), (890.0, True)])
def test_own_times_may_differ_from_the_streams_by_a_tenth(stream_ms: float, named: bool) -> None:
    replies = [Reply("a", tokens=50, first_ms=1.0, decode_ms=500.0, stream_ms=stream_ms / 2)] * 2
    assert (clock_difference("s", replies) is not None) is named


def test_an_address_of_several_models_is_asked_for_the_one_that_is_named(work: str) -> None:
    with running("--kind", "ollama", "-m", "one", "--more-models", "two,three") as stub:
        asked = bench(work, [stub])
        assert isinstance(asked.exception, UsageError) and "--model" in str(asked.exception)
        assert compared(work, [stub], "--model", "two")["servers"][0]["model"] == "two"


# -- figures ---------------------------------------------------------------------------------------------------------


def test_two_servers_are_compared_by_their_own_timings(work: str) -> None:
    """4 answers with 23 decoded tokens each take 184 ms at 2 ms per pass, and 368 ms at 4: 500 and 250 tokens/s."""
    found = compared(work, [f"{COMMAND} --ms-per-pass 2", f"{COMMAND} --ms-per-pass 4"])
    fast, slow = found["arms"]
    assert (fast["tokens"], fast["seconds"], fast["tokens_per_second"]) == (92, 0.184, 500.0)
    assert (slow["tokens"], slow["seconds"], slow["tokens_per_second"]) == (92, 0.368, 250.0)
    assert slow["speedup"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert (slow["identical"], slow["different"]) == (4, 0)
    assert fast["reference"] == slow["reference"] == fast["name"] == "stub_server.py 2"
    assert [arm["categories"]["chat"]["tokens"] for arm in found["arms"]] == [69, 69]
    assert [arm["categories"]["code"]["tokens"] for arm in found["arms"]] == [23, 23]
    assert found["engine"] == "server" and found["model"] == "stub.gguf" and found["workload"]["prompts"] == 3
    assert [server["kind"] for server in found["servers"]] == ["llama-server", "llama-server"]
    for arm in found["arms"]:
        assert arm["failure"] is None and arm["overhead_us_per_step"] is None
        assert 0 < arm["first_ms"]["p50"] <= arm["first_ms"]["p95"]
        assert 0 < arm["between_ms"]["p50"] <= arm["between_ms"]["p95"]


def test_passes_are_counted_by_what_was_accepted(work: str) -> None:
    """Each pass takes 2 ms, and yields the accepted tokens and one more: 23 tokens of an answer are all of them."""
    found = compared(work, [f"{COMMAND} --ms-per-pass 2", f"{COMMAND} --ms-per-pass 2 {LOOKUP}"])
    plain, lookup = found["arms"]
    assert (plain["steps"], plain["mean_acceptance_length"], plain["accepted_tokens"]) == (92, 1.0, 0)
    assert lookup["accepted_tokens"] > 0 and lookup["draft_tokens"] >= lookup["accepted_tokens"]
    assert lookup["steps"] == 92 - lookup["accepted_tokens"]
    assert lookup["seconds"] == pytest.approx(0.002 * lookup["steps"], abs=1e-4)
    assert lookup["mean_acceptance_length"] == pytest.approx(92 / lookup["steps"], abs=1e-4)
    assert lookup["identical"] == 4


def test_the_document_has_the_commands_without_their_keys(work: str) -> None:
    with running() as address:
        found = compared(work, [f"{COMMAND} --api-key k1", address, f"{COMMAND} --missing-model"])["servers"]
    assert [one["command"] for one in found] == [
        [*shlex.split(COMMAND), "--api-key", "***"],
        None,
        [*shlex.split(COMMAND), "--missing-model"],
    ]
    assert [one["kind"] for one in found] == ["llama-server", "llama-server", None]


def test_texts_that_differ_are_counted(work: str) -> None:
    first, second = compared(work, [COMMAND, f"{COMMAND} {LOOKUP} --wrong-draft"])["arms"]
    assert first["identical"] == 4 and second["identical"] + second["different"] == 4 and second["different"] >= 1


def test_events_are_not_compared_with_tokens(work: str) -> None:
    silent = f"{COMMAND} --kind openai --no-usage"
    for servers, counted in (([COMMAND, silent], [True, False]), ([silent, COMMAND], [False, True])):
        first, other = compared(work, servers)["arms"]
        assert [first["counted"], other["counted"]] == counted
        assert first["tokens"] == other["tokens"] == 92 and first["speedup"]["median"] == 1.0
        assert other["speedup"] is None and other["categories"]["chat"]["speedup"] is None
    shown = bench(work, [COMMAND, silent]).stdout
    (row,) = [line for line in shown.splitlines() if line.strip().startswith("stub_server.py --kind")]
    assert row.split()[4].endswith("*") and row.split()[6:8] == ["-", "-"]
    assert "* stub_server.py --kind openai --no-usage does not report how many tokens" in shown


def test_models_with_other_names_are_told(work: str) -> None:
    same = [f"{COMMAND} -m /a/Model.gguf", f"{COMMAND} -m /b/model.gguf"]
    assert compared(work, same)["other_models"] == []
    (line,) = compared(work, [f"{COMMAND} -m /a/one.gguf", f"{COMMAND} -m /a/two.gguf"])["other_models"]
    assert "serves two.gguf, and stub_server.py /a/one.gguf one.gguf" in line


def test_several_prompts_are_answered_at_once(work: str) -> None:
    """Prompts of one category share a group of 2; the second turn of `a` is answered alone."""
    found = compared(work, [f"{COMMAND} --parallel 2 --ms-per-pass 1"], "--concurrency", "2")
    (only,) = found["arms"]
    assert only["tokens"] == 92 and only["identical"] == 4 and found["workload"]["concurrency"] == 2
    assert only["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_a_server_with_fewer_slots_than_prompts_at_once_is_named(work: str) -> None:
    for slots, named in ((2, True), (3, False)):
        done = bench(work, [f"{COMMAND} --parallel {slots}"], "--concurrency", "3")
        said = "stub_server.py computes 2 answer(s) at once, so of 3 some wait"
        assert (done.exit_code, said in done.stderr) == (0, named)


def test_the_time_of_answers_at_once_is_shared_by_their_tokens() -> None:
    """The first token comes after 10 ms, the last one after 20 + 90 = 110: 100 ms for 30 + 10 decoded tokens."""
    replies = [
        Reply("a", tokens=31, first_ms=10.0, decode_ms=60.0, stream_ms=70.0),
        Reply("b", tokens=11, first_ms=20.0, decode_ms=60.0, stream_ms=90.0),
    ]
    assert decode_seconds(replies) == pytest.approx([0.075, 0.025])
    assert decode_seconds(replies[:1]) == [0.06]
    later = [replies[0], replace(replies[1], asked_at=0.2)]  # its last one is then at 310 ms: 300 ms for 40 tokens
    assert decode_seconds(later) == pytest.approx([0.225, 0.075])
    assert decode_seconds([Reply("a", 1, 5.0, 0.0, 0.0), Reply("b", 1, 5.0, 0.0, 0.0)]) == [0.0, 0.0]


def test_the_table_names_what_others_are_compared_with(work: str) -> None:
    shown = bench(work, [f"{COMMAND} --ms-per-pass 2", f"{COMMAND} --ms-per-pass 4"]).stdout
    assert "compared with stub_server.py 2" in shown
    (row,) = [line for line in shown.splitlines() if line.strip().startswith("stub_server.py 4")]
    assert row.split()[2:6] == ["250.0", "1.00", "0.50", "0.50-0.50"] and row.split()[-1] == "4/4"


def test_the_document_is_written_to_a_file(work: str, tmp_path: Path) -> None:
    found = compared(work, [COMMAND], "--out", str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == found


@pytest.mark.parametrize(
    ("commands", "names"),
    [
        ([("llama-server", ["x", "-m", "a"])], ["llama-server"]),
        ([("llama-server", ["x", "-m", "a"]), ("vllm", ["vllm", "serve", "a"])], ["llama-server", "vllm"]),
        (
            [("s", ["x", "-m", "a"]), ("s", ["x", "-m", "a", "--spec-type", "b"]), ("s", ["x", "-m", "a"])],
            ["s", "s --spec-type b", "s (2)"],
        ),
        ([("http://h", ()), ("http://h", ())], ["http://h", "http://h (2)"]),
        (
            [("s", ["x", "--api-key", "k1", "-c", "1"]), ("s", ["x", "--hf-token=k2", "-hft", "k3", "-c", "2"])],
            ["s --api-key 1", "s --hf-token=*** -hft 2"],
        ),
        ([("s", ["x", "a" * 60]), ("s", ["x"])], ["s " + "a" * 43 + "...", "s"]),
        (
            [("s", ["x", "-m", f"/{'a' * 60}/q{bits}.gguf", "-c", "9"]) for bits in (4, 8)] + [("t", ["y"])],
            ["s ...q4.gguf", "s ...q8.gguf", "t"],
        ),
    ],
)
def test_servers_are_named_by_what_sets_them_apart(commands: list[tuple[str, list[str]]], names: list[str]) -> None:
    assert names_apart(commands) == names


def test_further_servers_are_measured_in_rounds_with_the_first_one(work: str) -> None:
    """Two of those that specplug starts may run at once, and one at an address beside them."""
    with running("--ms-per-pass", "8") as address:
        servers = [f"{COMMAND} --ms-per-pass {ms}" for ms in (2, 4, 1)]
        found = compared(work, [servers[0], address, servers[1], servers[2]])
    assert [arm["tokens_per_second"] for arm in found["arms"]] == [500.0, 125.0, 250.0, 1000.0]
    assert [arm["speedup"]["median"] for arm in found["arms"]] == [1.0, 0.25, 0.5, 2.0]
    assert [arm["identical"] for arm in found["arms"]] == [4, 4, 4, 4]
    assert [arm["tokens"] for arm in found["arms"]] == [92, 92, 92, 92]  # the first one's second round is not added


def test_the_rounds_of_servers() -> None:
    def rounds(kinds: str) -> list[list[int]]:
        return rounds_of([open_subject(COMMAND if kind == "c" else "http://127.0.0.1:1") for kind in kinds])

    assert rounds("c") == [[0]] and rounds("cc") == [[0, 1]] and rounds("aaa") == [[0, 1, 2]]
    assert rounds("cacc") == [[0, 1, 2], [0, 3]]
    assert rounds("accca") == [[0, 1, 2, 4], [0, 3]]


# -- servers that fail -----------------------------------------------------------------------------------------------


def test_a_server_that_dies_in_the_middle_is_a_row_with_its_reason(work: str) -> None:
    """Its third streamed answer fails, so two are left of the four."""
    done = bench(work, [COMMAND, f"{COMMAND} --die-at 3", f"{COMMAND} --ms-per-pass 1"], "--json")
    first, dead, other = json.loads(done.stdout)["arms"]
    assert done.exit_code == 0
    assert dead["failure"] == "stub_server.py --die-at 3 ended with exit code 3; its last line: stub: out of memory"
    assert (dead["tokens"], dead["identical"]) == (46, 2)
    assert (first["failure"], first["tokens"], other["failure"], other["tokens"]) == (None, 92, None, 92)
    shown = bench(work, [COMMAND, f"{COMMAND} --die-at 3"]).stdout
    assert "stub_server.py --die-at 3, failed" in shown and "its last line: stub: out of memory" in shown


def test_without_the_first_server_there_is_nothing_to_compare_with(work: str) -> None:
    done = bench(work, [f"{COMMAND} --die-at 3", COMMAND], "--json")
    first, other = json.loads(done.stdout)["arms"]
    assert isinstance(done.exception, SpecplugError) and not isinstance(done.exception, UsageError)
    assert "stub_server.py --die-at 3, which the others are compared with, failed: " in str(done.exception)
    assert (first["tokens"], other["tokens"], other["identical"]) == (46, 92, 2)


def test_a_prompt_that_the_first_server_refuses_is_left_out_for_all(work: str) -> None:
    """The second turn of `a` has `six`, so three answers with 23 decoded tokens are left."""
    servers = [f"{COMMAND} --refused-word six", COMMAND, f"{COMMAND} --ms-per-pass 1"]
    done = bench(work, servers, "--json", "--repeats", "2")
    found = json.loads(done.stdout)
    assert done.exit_code == 0
    assert [(arm["failure"], arm["tokens"], arm["identical"]) for arm in found["arms"]] == [(None, 138, 3)] * 3
    (why,) = found["refused"].values()
    assert found["refused"].keys() == {"a"} and "exceeds the available context size" in why
    assert done.stderr.count("prompt a is left out for all: ") == 1


@pytest.mark.parametrize("other", ["--refused-word yellow", ""])
def test_of_prompts_asked_at_once_only_the_refused_one_is_left_out(work: str, other: str) -> None:
    """`a` and `b` are asked at once, and `yellow` is in `b`: three answers are left, of `a`'s two turns and of `c`."""
    servers = [f"{COMMAND} --parallel 2 --refused-word yellow", f"{COMMAND} --parallel 2 --ms-per-pass 1 {other}"]
    found = compared(work, servers, "--concurrency", "2")
    assert [(arm["failure"], arm["tokens"], arm["identical"]) for arm in found["arms"]] == [(None, 69, 3)] * 2
    (why,) = found["refused"].values()
    assert found["refused"].keys() == {"b"} and "exceeds the available context size" in why


def test_where_the_first_server_has_failed_a_prompt_that_all_others_refuse_is_left_out(work: str) -> None:
    """The first one fails in `a`'s first turn; the others answer both of its turns, and refuse `b`, as it would."""
    done = bench(work, [f"{COMMAND} --die-at 1", f"{COMMAND} --refused-word yellow"], "--json")
    first, other = json.loads(done.stdout)["arms"]
    assert "ended with exit code 3" in first["failure"] and (other["failure"], other["tokens"]) == (None, 69)
    assert json.loads(done.stdout)["refused"].keys() == {"b"}


def test_a_server_that_refuses_what_the_first_one_answers_has_failed(work: str) -> None:
    first, other = compared(work, [COMMAND, f"{COMMAND} --refused-word yellow"])["arms"]
    assert "exceeds the available context size" in other["failure"] and other["tokens"] == 46
    assert (first["failure"], first["tokens"]) == (None, 92)


def test_a_first_server_that_refuses_everything_has_failed(work: str) -> None:
    done = bench(work, [f"{COMMAND} --answer-tokens 0", COMMAND])
    assert isinstance(done.exception, SpecplugError) and "the answer is empty" in str(done.exception)


def test_a_server_that_does_not_start_beside_another_one_may_start_alone(work: str) -> None:
    first, other = compared(work, [COMMAND, COMMAND, f"{COMMAND} --missing-model"])["arms"][::2]
    advice = f"; it does not start beside {first['name']}: if it does alone, measure it alone"
    assert first["failure"] is None and other["failure"].endswith(advice)
    alone = json.loads(bench(work, [f"{COMMAND} --missing-model", COMMAND], "--json").stdout)["arms"][0]
    assert not alone["failure"].endswith("measure it alone"), "nothing ran beside it"


def test_a_server_that_adapts_itself_to_the_gpu_memory_that_another_one_leaves_is_named(work: str) -> None:
    """Before a further run, the first one starts beside the second one."""
    adapting, fixed = f"{COMMAND} -ngl auto -c 4096", f"{COMMAND} -ngl 99 -c 4096"
    said = "chooses -ngl by the GPU memory that stub_server.py {} leaves (--fit), so it may be slower than alone"
    assert said.format("99") in bench(work, [fixed, adapting]).stderr
    assert said.format("99") not in bench(work, [adapting, fixed]).stderr
    assert said.format("99") in bench(work, [adapting, fixed], "--repeats", "2").stderr
    done = bench(work, [f"{adapting} -fit off", fixed], "--repeats", "2")
    assert done.exit_code == 0 and "(--fit)" not in done.stderr


def test_a_server_that_does_not_start_is_a_row_with_its_last_line(work: str) -> None:
    first, missing, _ = compared(work, [COMMAND, f"{COMMAND} --missing-model", COMMAND])["arms"]
    assert "its last line: exiting due to model loading error" in missing["failure"] and missing["tokens"] == 0
    unknown = ("tokens_per_second", "speedup", "first_ms", "between_ms", "mean_acceptance_length", "steps")
    assert [missing[key] for key in unknown] == [None] * 6
    assert first["tokens"] == 92
    done = bench(work, [f"{COMMAND} --missing-model"])
    assert isinstance(done.exception, SpecplugError) and "exiting due to model loading error" in str(done.exception)


def test_a_server_beside_which_no_other_answers_was_compared_with_nothing(work: str, tmp_path: Path) -> None:
    done = bench(work, [COMMAND, f"{COMMAND} --missing-model"], "--json", "--out", str(tmp_path / "out.json"))
    assert json.loads(done.stdout)["arms"][0]["tokens"] == 92 and (tmp_path / "out.json").exists()
    assert done.exit_code == 1 and isinstance(done.exception, SpecplugError)
    assert str(done.exception).startswith(
        "stub_server.py --missing-model failed, so stub_server.py was compared with nothing: "
    )
    assert bench(work, [COMMAND, f"{COMMAND} --die-at 3"]).exit_code == 0  # two answers were compared


def test_a_further_server_that_cannot_be_started_as_its_command_says_is_a_row(work: str) -> None:
    """203.0.113.1 is an address for documentation (RFC 5737), so no machine has it."""
    foreign = f"{COMMAND} --host 203.0.113.1"
    first, wrong, other = compared(work, [COMMAND, foreign, f"{COMMAND} --ms-per-pass 1"])["arms"]
    assert wrong["failure"].startswith("--server: --host 203.0.113.1 is no address of this machine")
    assert (first["tokens"], wrong["tokens"], other["tokens"]) == (92, 0, 92)
    assert isinstance(bench(work, [foreign, COMMAND]).exception, UsageError)


def test_a_key_and_a_prefix_belong_to_an_address(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with running("--need-key", "secret", "--prefix", "/one/two", "--ms-per-pass", "1") as address:
        servers = [f"{COMMAND} --ms-per-pass 2", f"{address}/one/two"]
        refused = json.loads(bench(work, servers, "--json").stdout)["arms"][1]
        assert "401" in refused["failure"] and refused["tokens"] == 0
        monkeypatch.setenv("SPECPLUG_SERVER_KEY", "secret")
        own, other = compared(work, servers)["arms"]
        assert (other["failure"], other["name"]) == (None, f"{address}/one/two")
        assert other["speedup"]["median"] == 2.0 and other["identical"] == 4
        assert own["tokens_per_second"] == 500.0


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--server", "no-such-program --port 1"], "there is no program no-such-program"),
        (["--server", COMMAND, "--threads", "2"], "--threads: a server is measured as its own command says"),
        (["--server", COMMAND, "--temperature", "1"], "--temperature: a server is measured"),
        (["--server", COMMAND, "--profile", "default"], "name the model that it runs with --model"),
        (["--server", COMMAND, "--peer", "llama-cpp-python:plain"], "name the model that it runs with --model"),
        (
            ["--server", COMMAND, "--profile", "default", "--model", "demo:smollm2", "--temperature", "1"],
            "--temperature: servers answer greedily here",
        ),
        (
            ["--server", COMMAND, "--profile", "default", "--model", "demo:smollm2", "--concurrency", "1,4"],
            '--server "specplug serve --profile default --slots 4"',
        ),
        (
            ["--server", COMMAND, "--peer", "x", "--model", "demo:smollm2"],
            "--peer 'x': unknown",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(work: str, more: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, ["bench", "--workload", work, *more])
    assert isinstance(done.exception, UsageError) and complaint in str(done.exception)
    assert "starting" not in done.stderr


def test_a_server_that_cannot_be_opened_is_refused_before_a_profiles_models_are_got(work: str) -> None:
    done = bench(work, ["no-such-program"], "--profile", "default", "--model", "some-owner/some-model-GGUF/some.gguf")
    assert "there is no program no-such-program" in str(done.exception)


# -- the model -------------------------------------------------------------------------------------------------------


def test_a_program_is_asked_for_its_help_once(work: str, tmp_path: Path) -> None:
    """A script by llama-server's name that writes down how it was started."""
    script, log, model = tmp_path / "llama-server", tmp_path / "log", write_gguf(tmp_path / "model.gguf")
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {COMMAND} "$@"\n')
    script.chmod(0o755)
    assert bench(work, [str(script)], "--concurrency", "1,2", "--model", str(model)).exit_code == 0
    lines = log.read_text().splitlines()
    assert lines.count("--help") == 1
    assert [line.split()[:2] for line in lines if "--port" in line] == [["-m", str(model)]] * 2


def test_a_model_is_for_commands_that_name_none(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPLUG_MODEL", "/no/such/model.gguf")
    hub, own = f"{COMMAND} -hf owner/name", f"{COMMAND} -m /b/model.gguf"
    assert [server["kind"] for server in compared(work, [hub, own])["servers"]] == ["llama-server"] * 2
    missing = bench(work, [own, COMMAND]).exception
    assert isinstance(missing, UsageError) and "/no/such/model.gguf" in str(missing)


def test_a_program_whose_flag_for_the_model_is_not_known_starts_as_it_is(work: str, tmp_path: Path) -> None:
    """It says nothing of itself, so it may be any server."""
    script = tmp_path / "mine"
    script.write_text(f'#!/bin/sh\n[ "$1" = --help ] || exec {COMMAND} --kind openai "$@"\n')
    script.chmod(0o755)
    done = bench(work, [str(script)], "--model", "/no/such/model.gguf", "--json")
    assert json.loads(done.stdout)["servers"][0]["kind"] == "openai"
    assert "mine starts as its command says: how it takes --model /no/such/model.gguf is not known" in done.stderr


# -- processes -------------------------------------------------------------------------------------------------------


class Recorded:
    """A subject that writes down what happens to it, in a list that it shares with others."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name = name
        self.abilities = Abilities("openai", model="m")
        self._events = events

    def start(self, flags: Sequence[str] = ()) -> None:
        self._events.append(f"{self.name} starts")

    def ask(self, question: Question) -> Reply:
        self._events.append(f"{self.name} answers {len(question.messages)}")
        return Reply(f"{self.name}'s answer", 2, 1.0, 1.0, 1.0)

    def sleep(self) -> None:
        self._events.append(f"{self.name} sleeps")

    def wake(self) -> None:
        self._events.append(f"{self.name} wakes")

    def stop(self) -> None:
        self._events.append(f"{self.name} stops")


def test_only_the_server_that_is_asked_is_awake_and_the_order_changes() -> None:
    events: list[str] = []
    prompts = [Prompt("1", "chat", ("x", "y")), Prompt("2", "chat", ("z",))]
    subjects = [Recorded("A", events), Recorded("B", events)]
    compare_servers(subjects, [], [], prompts, workload="w", max_tokens=2)

    def asked(name: str, messages: int) -> list[str]:
        return [f"{name} wakes", f"{name} answers {messages}", f"{name} sleeps"]

    assert events == [
        *("A starts", "A sleeps", "B starts", "B sleeps"),
        *(*asked("A", 1), *asked("B", 1), *asked("A", 3), *asked("B", 3)),  # the second turn: with two earlier messages
        *(*asked("B", 1), *asked("A", 1)),
        *("B stops", "A stops"),
    ]


def test_servers_start_again_before_a_further_run() -> None:
    events: list[str] = []
    subjects = [Recorded("A", events), Recorded("B", events)]
    compare_servers(subjects, [], [], [Prompt("1", "chat", ("x",))], workload="w", max_tokens=2, repeats=2)
    once = ["A starts", "A sleeps", "B starts", "B sleeps"]
    asked = {name: [f"{name} wakes", f"{name} answers 1", f"{name} sleeps"] for name in "AB"}
    assert events == [*once, *asked["A"], *asked["B"], *once, *asked["B"], *asked["A"], "B stops", "A stops"]


class StartsOnce(Recorded):
    def start(self, flags: Sequence[str] = ()) -> None:
        if f"{self.name} starts" in self._events:
            raise UsageError("no room")
        super().start(flags)


def test_a_server_that_does_not_start_again_keeps_its_first_run() -> None:
    subjects = [Recorded("A", []), StartsOnce("B", [])]
    found = compare_servers(subjects, [], [], [Prompt("1", "chat", ("x",))], workload="w", max_tokens=2, repeats=3)
    assert [(arm["failure"], arm["tokens"]) for arm in found["arms"]] == [(None, 3), ("no room", 1)]


@pytest.mark.parametrize(("more", "said"), [([], False), (["--repeats", "2"], True), (["--concurrency", "1,2"], True)])
def test_a_server_that_cannot_be_restarted_is_named(work: str, more: list[str], said: bool) -> None:
    with running() as address:
        done = bench(work, [COMMAND, address], *more)
        assert done.exit_code == 0 and (f"{address} cannot be restarted" in done.stderr) is said
    assert "stub_server.py cannot be restarted" not in done.stderr


class Particular(Recorded):
    """Refuses the prompt `z`."""

    def ask(self, question: Question) -> Reply:
        if question.messages[-1]["content"] == "z":
            raise RefusedQuestion("too long")
        return super().ask(question)


class Counting(Recorded):
    """Sends a piece every 5 ms, but to `z` in one event after 500 ms by its stream, which it says took 1 ms."""

    def ask(self, question: Question) -> Reply:
        if question.messages[-1]["content"] == "z":
            return Reply("pieces", 2, 1.0, 1.0, 500.0, gaps_ms=(500.0,), counted=False)
        return Reply("tokens", 2, 1.0, 5.0, 5.0, gaps_ms=(5.0,))


def test_answers_to_a_prompt_that_the_first_server_refuses_are_in_no_figure() -> None:
    prompts = [Prompt("1", "chat", ("x",)), Prompt("2", "chat", ("z",))]
    said: list[str] = []
    subjects = [Particular("A", []), Counting("B", [])]
    found = compare_servers(subjects, [], [], prompts, workload="w", max_tokens=2, notify=said.append)
    _, other = found["arms"]
    assert other["between_ms"] == {"p50": 5.0, "p95": 5.0} and other["counted"] and other["speedup"] is not None
    assert found["refused"] == {"2": "too long"} and not any("compare them with care" in one for one in said)


class Broken(Recorded):
    def ask(self, question: Question) -> Reply:
        raise SubjectError("no more")


def test_a_run_ends_where_all_have_failed() -> None:
    events: list[str] = []
    prompts = [Prompt(str(number), "chat", ("x",)) for number in range(3)]
    found = compare_servers([Broken("A", events), Broken("B", events)], [], [], prompts, workload="w", max_tokens=2)
    assert [arm["failure"] for arm in found["arms"]] == ["no more", "no more"]
    assert events.count("A wakes") == 1 and events[-2:] == ["B stops", "A stops"]


class Spelling:
    """An arm of tokens: it answers the tokens of the prompt, backwards."""

    name, profile = "spelling", "mine"
    reset = close = staticmethod(lambda: None)

    def answer(self, prompts: Sequence[np.ndarray[Any, Any]], max_tokens: int) -> list[engine_arms.Result]:
        return [engine_arms.Result(prompt.tolist()[::-1][:max_tokens], 0.5, None, 0.25) for prompt in prompts]


def test_an_arm_of_tokens_answers_conversations() -> None:
    encode: Callable[[Any], Any] = lambda messages: np.array([ord(c) for c in messages[-1]["content"]], np.int32)  # noqa: E731
    arm = EngineArm(Spelling(), encode, lambda tokens: "".join(map(chr, tokens)))
    (found,) = arm.answer([[{"role": "user", "content": "abcd"}]], 3)
    assert (found.content, found.length, found.seconds, found.prompt_seconds) == ("dcb", 3, 0.5, 0.25)


def test_no_engine_is_needed(work: str) -> None:
    """The engines' packages cannot be imported, as on a machine that has none."""
    program = (
        "import sys\n"
        "for name in ('llama_cpp', 'vllm', 'torch', 'gguf', 'transformers'): sys.modules[name] = None\n"
        "from specplug_cli.main import app\n"
        "app()\n"
    )
    words = ["bench", "--server", COMMAND, "--workload", work, "--max-tokens", "4", "--json"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["arms"][0]["tokens"] == 12


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_no_process_is_left_after_ctrl_c(work: str) -> None:
    mark = f"left-{os.getpid()}"
    words = ["--server", f"{COMMAND} --alias {mark} --ms-per-pass 50", "--workload", work]
    process = subprocess.Popen([sys.executable, "-m", "specplug_cli.main", "bench", *words], stderr=subprocess.PIPE)
    give_up = time.monotonic() + 30
    while not alive(mark) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert alive(mark)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not alive(mark)


def alive(mark: str) -> bool:
    """Whether a stub server with this alias runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in words and any(word.endswith(b"stub_server.py") for word in words):
            return True
    return False
