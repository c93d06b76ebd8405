"""A real llama-server from beginning to end: llama.cpp's own server code in the wheel of xllamacpp, on SmolLM2."""

import importlib.util
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_server import ngram_simple

from specplug.subjects.launched import LaunchedServer
from specplug.subjects.opening import open_subject
from specplug.subjects.subject import Question, Reply

if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("needs xllamacpp", allow_module_level=True)

pytestmark = pytest.mark.llama

LAUNCHER = Path(__file__).parent / "wheel_llama_server.py"
TOKENS, SIZE_N, SIZE_M = 48, 2, 4
SIMPLE = ["--spec-type", "ngram-simple"]
SIMPLE += ["--spec-ngram-simple-size-n", str(SIZE_N), "--spec-ngram-simple-size-m", str(SIZE_M)]

QUESTIONS = [
    [{"role": "user", "content": "Repeat this line four times: the red house is on the green hill by the blue sea."}],
    [{"role": "user", "content": "List the numbers from one to ten, each with the word apple: one apple, two apples,"}],
]


@pytest.fixture(scope="module")
def server(demo_path: Path) -> Iterator[LaunchedServer]:
    words = [sys.executable, str(LAUNCHER), "-m", str(demo_path), "-c", "1024", "-t", "1"]
    opened = open_subject(shlex.join(words))
    assert isinstance(opened, LaunchedServer)
    yield opened
    opened.stop()


@pytest.fixture(scope="module")
def replies(server: LaunchedServer) -> list[list[Reply]]:
    """Of plain decoding, then of ngram-simple, to each question."""
    found = []
    for flags in ([], SIMPLE):
        server.start(flags)
        able = server.abilities
        assert (able.kind, able.slots, able.context) == ("llama-server", 1, 1024)
        assert able.token_ids and able.timings and able.counters and able.logprobs
        found.append([server.ask(Question(messages, TOKENS, ids=True)) for messages in QUESTIONS])
    return found


def test_texts_and_tokens_are_equal_with_and_without_drafts(replies: list[list[Reply]]) -> None:
    for plain, drafting in zip(*replies, strict=True):
        assert plain.text == drafting.text and plain.ids == drafting.ids and plain.prompt_ids == drafting.prompt_ids
        assert plain.ids is not None and len(plain.ids) == plain.tokens <= TOKENS


def test_counters_are_those_of_the_lookup_rule(replies: list[list[Reply]]) -> None:
    """The rule of `common_ngram_simple_draft`, over the tokens that the server has told. An end token that was drafted
    does not count as accepted."""
    assert [reply.draft_tokens for reply in replies[0]] == [0, 0]
    for reply in replies[1]:
        assert reply.ids is not None and reply.prompt_ids is not None
        drafted = accepted = 0
        done = 1  # the prompt's pass emits the first token
        while done < reply.tokens:
            text = [*reply.prompt_ids, *reply.ids[:done]]
            draft = ngram_simple(text[:-1], text[-1], SIZE_N, SIZE_M)[: TOKENS - done - 1]
            coming = reply.ids[done : -1 if reply.finish == "stop" else None]
            hits = next((n for n, (a, b) in enumerate(zip(draft, coming, strict=False)) if a != b), None)
            hits = min(len(draft), len(coming)) if hits is None else hits
            drafted, accepted, done = drafted + len(draft), accepted + hits, done + hits + 1
        assert (reply.draft_tokens, reply.accepted_tokens) == (drafted, accepted)
        assert accepted > 0


def test_the_servers_own_times_agree_with_the_stream(replies: list[list[Reply]]) -> None:
    for reply in [*replies[0], *replies[1]]:
        assert 0 < reply.decode_ms <= reply.stream_ms + 50
        assert reply.first_ms > 0 and sum(reply.gaps_ms) <= reply.stream_ms + 1
