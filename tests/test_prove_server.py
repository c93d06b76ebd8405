"""`verify --server`: the stub server with drafting against without; and how a difference is explained."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from subject_stubs import COMMAND, LOOKUP, running

from specplug.bench.prove_server import TIE, difference
from specplug.errors import SpecplugError, UsageError
from specplug.subjects.subject import Reply
from specplug_cli.main import app


@pytest.fixture
def work(tmp_path: Path) -> str:
    """Two prompts, of which the second has a further turn, which verify does not ask."""
    path = tmp_path / "work.jsonl"
    lines = [
        {"id": "a", "category": "chat", "prompt": "one two three four five"},
        {"id": "b", "category": "chat", "turns": ["red green blue yellow", "more"]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def verify(work: str, server: str, *more: str) -> Result:
    words = ["verify", "--server", server, "--workload", work, "--limit", "2", "--max-tokens", "40", *more]
    return CliRunner().invoke(app, words)


# -- the command -----------------------------------------------------------------------------------------------------


def test_equal_texts_are_reported(work: str) -> None:
    done = verify(work, f"{COMMAND} {LOOKUP}", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    counts = found["settings"]["greedy"]
    assert counts.pop("accepted_tokens") > 0
    assert counts == found["itself"] == {"answers": 2, "identical": 2, "rounding": 0, "different": 0}
    assert (found["same_output"], found["deterministic"], found["differences"]) == (True, True, [])
    assert (found["switch"], found["model"], found["server"]["kind"]) == ("restart", "stub.gguf", "llama-server")
    assert "without --spec-type ngram-simple --spec-ngram-simple-size-n 3" in done.stderr


def test_a_wrong_draft_is_found_at_its_place(work: str) -> None:
    """The stub answers the message, `step1`, the message, and so on. Its first wrong token is one that it accepted."""
    done = verify(work, f"{COMMAND} {LOOKUP} --wrong-draft", "--json")
    assert done.exit_code == 4
    found = json.loads(done.stdout)
    assert found["settings"]["greedy"]["different"] == 2 and found["deterministic"] and not found["same_output"]
    for entry, words in zip(found["differences"], ("one two three four five", "red green blue yellow"), strict=True):
        text = " " + " ".join(f"{words} step{n}" for n in range(1, 12))
        at = entry["position"]
        assert text[:at].endswith(entry["common"]) and text.startswith(entry["plain"], at)
        assert entry["other"].startswith("WRONG")
        assert entry["token"] == len(text[:at].split())
        word = text[at:].split()[0]
        assert max(entry["plain_top"], key=entry["plain_top"].get) == f" {word}"
        assert max(entry["other_top"], key=entry["other_top"].get) == " WRONG"
        assert (entry["gap"], entry["verdict"], entry["setting"]) == (None, "different", "greedy")


def test_a_difference_is_shown_with_both_texts(work: str) -> None:
    shown = verify(work, f"{COMMAND} {LOOKUP} --wrong-draft").stdout
    assert "different: prompt a, character" in shown and "one of the two is not among the 5 likeliest" in shown
    assert "  drafting: 'WRONG" in shown and "likeliest: ' WRONG' -0.105" in shown


def test_a_server_that_switches_by_request_is_not_restarted(work: str) -> None:
    done = verify(work, f"{COMMAND} {LOOKUP} --kind specplug", "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    with running(*LOOKUP.split(), "--kind", "specplug") as address:
        equal = verify(work, address, "--json")
        assert equal.exit_code == 0 and json.loads(equal.stdout)["switch"] == "request"
    with running(*LOOKUP.split(), "--kind", "specplug", "--wrong-draft") as address:
        wrong = verify(work, address, "--json")
        assert wrong.exit_code == 4 and len(json.loads(wrong.stdout)["differences"]) == 2


@pytest.mark.parametrize("wrong", [False, True])
def test_a_server_that_differs_from_itself_is_not_deterministic_whatever_drafting_does(work: str, wrong: bool) -> None:
    """The started one with drafting counts its answers from 1 again, so only wrong drafts make other texts of them."""
    done = verify(work, f"{COMMAND} {LOOKUP} --unsteady {'--wrong-draft' if wrong else ''}", "--json")
    found = json.loads(done.stdout)
    assert (found["itself"]["different"], found["same_output"]) == (2, not wrong)
    assert done.exit_code == 1 and isinstance(done.exception, SpecplugError)
    assert str(done.exception) == (
        "stub_server.py is not deterministic by itself: 2 of 2 answers without drafting differ when they are asked "
        "again"
    )


def test_an_address_that_cannot_switch_is_refused_with_what_to_pass(work: str) -> None:
    with running(*LOOKUP.split()) as address:
        done = verify(work, address)
    assert isinstance(done.exception, UsageError)
    assert str(done.exception) == (
        f"{address} was not started by specplug, and cannot turn drafting off for one request; pass the command that "
        'starts it, such as --server "llama-server -m MODEL.gguf --spec-type ngram-simple"'
    )


def test_a_command_that_does_not_draft_is_refused(work: str) -> None:
    done = verify(work, COMMAND)
    assert isinstance(done.exception, UsageError)
    assert "has no flags that draft, so there is nothing to check; add some" in str(done.exception)


def test_a_server_that_dies_is_an_error_with_its_last_line(work: str) -> None:
    done = verify(work, f"{COMMAND} {LOOKUP} --die-at 2")
    assert isinstance(done.exception, SpecplugError) and not isinstance(done.exception, UsageError)
    assert "exit code 3; its last line: stub: out of memory" in str(done.exception)


def test_a_prompt_that_the_server_refuses_is_left_out_with_a_line(work: str) -> None:
    """By a server that is restarted, and by one that turns drafting off by request. `three` is in prompt a."""
    flags = f"{LOOKUP} --refused-word three --wrong-draft"
    with running(*flags.split(), "--kind", "specplug") as address:
        runs = [verify(work, server, "--json") for server in (f"{COMMAND} {flags}", address)]
    for done in runs:
        assert done.exit_code == 4, (done.stderr, done.exception)
        found = json.loads(done.stdout)
        assert found["itself"] == {"answers": 1, "identical": 1, "rounding": 0, "different": 0}
        assert [entry["prompt"] for entry in found["differences"]] == ["b"]
        (why,) = found["refused"].values()
        assert found["refused"].keys() == {"a"} and "exceeds the available context size" in why
        assert done.stderr.count(f"prompt a is left out: {why}") == 1
    assert json.loads(verify(work, f"{COMMAND} {LOOKUP}", "--json").stdout)["refused"] == {}


def test_a_server_that_refuses_all_prompts_is_an_error(work: str) -> None:
    """`ee` is in both."""
    done = verify(work, f"{COMMAND} {LOOKUP} --refused-word ee")
    assert isinstance(done.exception, SpecplugError) and not isinstance(done.exception, UsageError)
    assert "refuses all 2 prompts, so there is nothing to check; the last: " in str(done.exception)
    assert "exceeds the available context size" in str(done.exception)


def test_a_prompt_that_is_refused_with_drafting_only_is_a_fault(tmp_path: Path, work: str) -> None:
    """A script that refuses a word where it drafts."""
    script = tmp_path / "mine"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--spec-type*) exec {COMMAND} "$@" --refused-word three;; esac\nexec {COMMAND} "$@"\n'
    )
    script.chmod(0o755)
    done = verify(work, f"{script} {LOOKUP}")
    assert isinstance(done.exception, SpecplugError) and "exceeds the available context size" in str(done.exception)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--profile", "default", "--model", "demo:smollm2"], "a profile"),
        (["--settings", "sampled"], "--settings sampled"),
        (["--as-is"], "--as-is"),
    ],
)
def test_what_belongs_to_profiles_is_refused(work: str, more: list[str], what: str) -> None:
    done = verify(work, f"{COMMAND} {LOOKUP}", *more)
    assert isinstance(done.exception, UsageError) and f"--server and {what} were both given" in str(done.exception)


def test_where_nothing_is_drafted_it_is_said(work: str) -> None:
    """No 30 tokens in a row occurred before among 40 that are preceded by a short prompt."""
    long = "--spec-type ngram-simple --spec-ngram-simple-size-n 30 --spec-ngram-simple-size-m 30"
    done = verify(work, f"{COMMAND} {long}")
    assert done.exit_code == 0 and "drafted nothing, so equal texts show nothing" in done.stderr


# -- differences -----------------------------------------------------------------------------------------------------


def reply(*tokens: str, others: tuple[dict[str, float], ...] = (), told: bool = True) -> Reply:
    """An answer of these tokens, each with probability 0.5; others: further likely tokens at each place."""
    further = [*others, *({} for _ in range(len(tokens) - len(others)))]
    half = math.log(0.5)
    top: Any = tuple({token: half, **more} for token, more in zip(tokens, further, strict=True)) if told else ()
    return Reply("".join(tokens), len(tokens), 1.0, 1.0, 1.0, top=top)


def test_equal_texts_have_no_difference() -> None:
    assert difference("greedy", "p", reply("a", "b"), reply("ab", told=False)) is None


@pytest.mark.parametrize(
    ("probability", "verdict"),
    [(0.49, "rounding"), (0.38, "rounding"), (0.36, "different"), (0.1, "different")],
)
def test_a_near_tie_is_rounding(probability: float, verdict: str) -> None:
    """The plain token has probability 0.5, so the gap is ln(0.5/p): 0.274 at 0.38, and 0.329 at 0.36."""
    plain = reply("the", " cat", " sat", others=({}, {" car": math.log(probability)}))
    found = difference("greedy", "p", plain, reply("the", " car", " ran", told=False))
    assert found is not None and TIE == 0.3
    assert found.gap == pytest.approx(math.log(0.5 / probability), abs=1e-4)
    assert (found.verdict, found.position, found.token) == (verdict, 6, 1)
    assert (found.common, found.plain, found.other) == ("the ca", "t sat", "r ran")


def test_the_other_answers_probabilities_do_where_the_plain_ones_are_not_told() -> None:
    other = reply("the", " car", others=({}, {" cat": math.log(0.45)}))
    found = difference("greedy", "p", reply("the", " cat", told=False), other)
    assert found is not None and found.verdict == "rounding" and found.gap == pytest.approx(0.1054, abs=1e-4)
    assert found.token is None and found.plain_top == {}


def test_without_probabilities_a_difference_is_one() -> None:
    found = difference("greedy", "p", reply("a", "b", told=False), reply("a", "c", told=False))
    assert found is not None and (found.verdict, found.gap, found.position) == ("different", None, 1)


def test_an_answer_that_ends_earlier_parts_at_its_end() -> None:
    """The control token of the end is not part of the text, but among the likeliest tokens of the other answer."""
    longer = reply("a", "b", "c", others=({}, {"<|im_end|>": math.log(0.45)}))
    found = difference("greedy", "p", reply("a"), longer)
    assert found is not None and (found.position, found.plain, found.other) == (1, "", "bc")
    assert found.verdict == "rounding" and found.gap == pytest.approx(0.1054, abs=1e-4)


def test_tokens_that_do_not_make_the_text_are_not_trusted() -> None:
    """Servers write a token with half a character as a replacement character."""
    plain = Reply("é b", 3, 1.0, 1.0, 1.0, top=({"\ufffd": -0.1}, {"\ufffd": -0.1}, {" b": -0.1, " c": -0.2}))
    found = difference("greedy", "p", plain, Reply("é c", 3, 1.0, 1.0, 1.0))
    assert found is not None and (found.gap, found.token, found.verdict) == (None, None, "different")
