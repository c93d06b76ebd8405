"""A server that remembers its answers: which ones, and that drafting finds them while it runs. On a toy engine."""

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from toy_serving import END, ToyEngine, serving

from specplug.core import int_array
from specplug.corpora.folder import place, read_manifest
from specplug.corpora.writing import documents_of, remove
from specplug.engines import remembering as module
from specplug.engines.remembering import Remembered
from specplug.profile import Profile, Remember
from specplug.profile.with_corpora import corpora_of
from specplug.proposers.datastore import Datastore
from specplug.registry import ProposerSpec
from specplug.server import answer_recorder


@pytest.fixture(autouse=True)
def quick_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(module, "tokenizer_hash", lambda path: "0" * 64)
    monkeypatch.setattr(module, "vocabulary_size", lambda path: END + 1)
    monkeypatch.setattr(answer_recorder, "INTERVAL_S", 0.02)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "toy.gguf"
    path.write_bytes(b"weights")
    return path


def started(model: Path, said: list[str], **options: Any) -> tuple[Remembered, ToyEngine]:
    """A memory, and an engine with the proposer that its profile then has."""
    spec = ProposerSpec("datastore", {"corpora": [], **options})
    profile = Profile("toy", proposers=(spec,), remember=Remember("notes"))
    remembered = Remembered(profile, lambda: model, said.append, reopened=True)
    (spec,) = remembered.profile.proposers
    return remembered, ToyEngine(datastore=Datastore(**spec.options))


def kept() -> list[str]:
    """The remembered texts, without the end of the answer."""
    folder = place("notes")
    if not (folder / "corpus.json").is_file():
        return []
    manifest = read_manifest(folder)
    return [
        bytes(token for token in document.tokens.tolist() if token != END).decode()
        for entry in manifest.shards
        for document in documents_of(folder, entry, END + 1)
    ]


def complete(url: str, prompt: str, *, status: int = 200, **fields: Any) -> None:
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)) as connection:
        body = json.dumps({"prompt": prompt, "max_tokens": 100, **fields})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == status, response.read()


def wait_for(condition: Callable[[], bool]) -> None:
    until = monotonic() + 20
    while not condition():
        assert monotonic() < until
        sleep(0.01)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def url(model: Path, said: list[str]) -> Iterator[tuple[str, ToyEngine]]:
    remembered, engine = started(model, said)
    with serving(engine, answer_store=remembered) as server_url:
        yield server_url, engine


def test_an_answer_is_drafted_from_while_the_server_runs(url: tuple[str, ToyEngine]) -> None:
    """The toy engine answers with the prompt."""
    server, engine = url
    complete(server, "a long winter in the harbour")
    wait_for(lambda: kept() != [])
    assert kept() == [" harboura long winter in the harbour"]
    datastore = engine.datastore
    assert datastore is not None
    wait_for(lambda: bool(datastore.shared_corpora))
    datastore.begin(99, int_array(list(b"see the long wint")))
    assert bytes(datastore.propose(99, 3).tokens.tolist()) == b"er "
    complete(server, "another summer")
    wait_for(lambda: len(kept()) == 2)
    wait_for(lambda: datastore.shared_corpora[0].manifest.documents == 2)


def test_a_private_answer_is_not_kept(url: tuple[str, ToyEngine]) -> None:
    server, _ = url
    complete(server, "the secret", specplug={"private": True})
    complete(server, "no secret")
    wait_for(lambda: kept() != [])
    assert kept() == ["o secretno secret"]


def test_an_answer_that_fails_is_not_kept(url: tuple[str, ToyEngine]) -> None:
    server, engine = url
    engine.loop.fail = RuntimeError("lost")
    complete(server, "broken off", status=503)
    complete(server, "complete")
    wait_for(lambda: kept() != [])
    assert kept() == ["completecomplete"]


def test_where_tenants_share_a_server_only_those_that_name_the_memory_are_kept(model: Path, said: list[str]) -> None:
    remembered, engine = started(model, said, corpora_for="asking")
    with serving(engine, answer_store=remembered) as server:
        complete(server, "of one tenant")
        complete(server, "kept text", specplug={"corpora": ["notes"]})
        wait_for(lambda: kept() != [])
    assert kept() == ["ept textkept text"]
    assert remembered.learned() is None  # the counts are of the other request, too


def test_a_new_server_starts_with_what_the_last_one_remembered(model: Path, said: list[str]) -> None:
    remembered, engine = started(model, said)
    assert corpora_of(remembered.profile) == []
    with serving(engine, answer_store=remembered) as server:
        complete(server, "something long to keep")
    remembered.write()  # as at the end of the process
    again, _ = started(model, said)
    assert corpora_of(again.profile) == ["notes"] and again.learned() == {"toy": (3.0, 1.0)}


def test_a_fault_in_one_round_does_not_end_the_others(
    url: tuple[str, ToyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, engine = url

    def fails(name: str) -> None:
        raise ValueError("once")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "open_corpus", fails)
        complete(server, "the first one")
        wait_for(lambda: kept() != [])
        sleep(0.1)
    complete(server, "the second one")
    wait_for(lambda: engine.datastore is not None and len(engine.datastore.shared_corpora) == 1)


def test_a_corpus_that_was_closed_is_written_and_stays_closed(model: Path, said: list[str]) -> None:
    remembered, engine = started(model, said)
    with serving(engine, answer_store=remembered) as server:
        complete(server, "the first one")
        wait_for(lambda: engine.datastore is not None and len(engine.datastore.shared_corpora) == 1)
        assert engine.datastore is not None and engine.datastore.close("notes")
        complete(server, "the second one")
        wait_for(lambda: len(kept()) == 2)
        sleep(0.1)
        assert engine.datastore.shared_corpora == () and engine.datastore.offered == []


def test_acceptance_that_counts_a_private_request_is_not_kept(model: Path, said: list[str]) -> None:
    remembered, engine = started(model, said)
    with serving(engine, answer_store=remembered) as server:
        complete(server, "the first one")
        wait_for(lambda: remembered.learned() is not None)
        engine.learned = lambda: {"toy": (9.0, 9.0)}  # type: ignore[method-assign]
        complete(server, "not to be kept", specplug={"private": True})
        complete(server, "the second one")
        wait_for(lambda: len(kept()) == 2)
    remembered.write()
    assert remembered.learned() == {"toy": (3.0, 1.0)}


def test_a_memory_that_is_removed_while_served_starts_again(url: tuple[str, ToyEngine]) -> None:
    server, _ = url
    complete(server, "before it")
    wait_for(lambda: kept() != [])
    remove(place("notes"))
    complete(server, "after it")
    wait_for(lambda: kept() != [])
    assert kept() == ["after itafter it"]
