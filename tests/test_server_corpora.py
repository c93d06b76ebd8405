"""Corpora of a running server: listing, adding and removing them, and naming them in requests. On a toy engine."""

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from corpus_files import write_corpus
from toy_serving import END, ToyEngine, serving

from specplug.core import EMPTY, SequenceOptions, Step, int_array
from specplug.corpora import writing
from specplug.corpora.folder import MANIFEST, corpora_folder
from specplug.proposers.datastore import Datastore

KEY = "s3cret"
CHAT = "/v1/chat/completions"
CORPORA = "/v1/corpora"


def call(url: str, method: str, path: str, body: Any = None, *, key: str | None = KEY) -> tuple[int, Any]:
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)) as connection:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def add(url: str, name: str) -> tuple[int, Any]:
    return call(url, "POST", CORPORA, {"name": name})


def listed(url: str) -> dict[str, str]:
    """What has become of the files of every open corpus, by name."""
    status, body = call(url, "GET", CORPORA)
    assert status == 200 and body["object"] == "list"
    return {entry["id"]: entry["on_disk"] for entry in body["data"]}


def message(answer: tuple[int, Any]) -> tuple[int, str]:
    status, body = answer
    assert set(body) == {"error"} and "\n" not in body["error"]["message"]
    return status, body["error"]["message"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's corpora: `a` and `b`; after 1 and 2, these have 10 and 11."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    corpora_folder().mkdir(parents=True)
    for name, token in (("a", 10), ("b", 11)):
        write_corpus(corpora_folder() / name, [[1, 2, token]], END + 1)
    return corpora_folder()


@pytest.fixture
def engine() -> ToyEngine:
    return ToyEngine(datastore=Datastore(corpora=[]), step_s=0.002)


@pytest.fixture
def url(engine: ToyEngine) -> Iterator[str]:
    with serving(engine, key=KEY) as server_url:
        yield server_url


# -- changing the corpora ---------------------------------------------------------------------------------------------


def test_corpora_are_added_listed_and_removed(url: str, engine: ToyEngine) -> None:
    assert listed(url) == {}
    status, entry = add(url, "a")
    assert status == 201 and entry == {
        "id": "a",
        "object": "corpus",
        "tokens": 4,
        "documents": 1,
        "model": "toy",
        "licence": "",
        "on_disk": "same",
        "open_to_requests": True,
    }
    assert add(url, "b")[0] == 201 and listed(url) == {"a": "same", "b": "same"}
    assert call(url, "DELETE", f"{CORPORA}/a") == (200, {"id": "a", "object": "corpus", "removed": True})
    assert listed(url) == {"b": "same"}
    assert engine.datastore is not None and [corpus.name for corpus in engine.datastore.shared_corpora] == ["b"]


def test_adding_an_open_corpus_again_changes_nothing_or_opens_what_was_rebuilt(
    url: str, engine: ToyEngine, folder: Path
) -> None:
    assert engine.datastore is not None
    add(url, "a")
    add(url, "b")
    before = engine.datastore.shared_corpora
    assert add(url, "a")[0] == 200 and engine.datastore.shared_corpora is before
    write_corpus(folder / "a", [[1, 2, 12], [3]], END + 1)
    assert listed(url) == {"a": "changed", "b": "same"}
    status, entry = add(url, "a")
    assert (status, entry["tokens"]) == (200, 6) and listed(url) == {"a": "same", "b": "same"}


def test_running_sequences_draft_from_what_was_added_and_not_from_what_was_removed(url: str, engine: ToyEngine) -> None:
    proposer = engine.datastore
    assert proposer is not None
    proposer.begin(0, int_array([1, 2]))
    add(url, "a")
    assert proposer.propose(0, 4).tokens.tolist() == [10]
    add(url, "b")
    call(url, "DELETE", f"{CORPORA}/a")
    proposer.observe(0, Step([1, 2], EMPTY, []))
    assert proposer.propose(0, 4).tokens.tolist() == [11]


def test_a_corpus_that_is_deleted_on_disk_stays_open(url: str, engine: ToyEngine, folder: Path) -> None:
    add(url, "a")
    add(url, "b")
    writing.remove(folder / "a")
    (folder / "b" / MANIFEST).write_text("{")
    assert listed(url) == {"a": "deleted", "b": "changed"}
    assert engine.datastore is not None
    engine.datastore.begin(0, int_array([1, 2]))
    assert sorted(engine.datastore.propose(0, 4).tokens.tolist()) == [10, 11]
    assert call(url, "DELETE", f"{CORPORA}/a")[0] == 200 and message(add(url, "a"))[0] == 404


def test_changes_beside_answers_and_one_another_leave_none_out(url: str, folder: Path) -> None:
    for n in range(8):
        write_corpus(folder / f"c{n}", [[1, 2, n]], END + 1)

    def ask(n: int) -> int:
        return call(url, "POST", CHAT, {"messages": [{"role": "user", "content": "x" * 50}]})[0]

    with ThreadPoolExecutor(16) as threads:
        answers = threads.map(ask, range(8))
        added = threads.map(lambda n: add(url, f"c{n}")[0], range(8))
        assert [*answers] == [200] * 8 and [*added] == [201] * 8
    assert listed(url).keys() == {f"c{n}" for n in range(8)}


# -- what is refused --------------------------------------------------------------------------------------------------


def test_without_a_key_corpora_are_listed_and_not_changed(engine: ToyEngine) -> None:
    with serving(engine) as open_url:
        assert call(open_url, "GET", CORPORA, key=None) == (200, {"object": "list", "data": []})
        refused = [
            call(open_url, "POST", CORPORA, {"name": "a"}, key=None),
            call(open_url, "POST", CORPORA, {"name": "a"}, key="any"),
            call(open_url, "DELETE", f"{CORPORA}/a", key=None),
        ]
        assert [message(answer) for answer in refused] == [
            (403, "a server without an API key does not change its corpora; start it with --api-key")
        ] * 3
        assert engine.datastore is not None and not engine.datastore.shared_corpora


def test_a_wrong_key_neither_lists_nor_changes_them(url: str) -> None:
    for method, path, body in (("GET", "", None), ("POST", "", {"name": "a"}), ("DELETE", "/a", None)):
        for key in (None, "wrong"):
            assert message(call(url, method, CORPORA + path, body, key=key))[0] == 401


def test_only_names_are_taken(url: str) -> None:
    paths = ["", ".", "..", "../a", "/etc", "./a", "a/", "a/b", "~", "A", "a\n", "a\0", "-a", "a b", "a" * 101]
    for name in (*paths, 1, None, ["a"], {}):
        status, text = message(call(url, "POST", CORPORA, {"name": name}))
        assert status == 400 and text.startswith("name: ")
    for body in ({}, {"name": "a", "path": "/etc"}, [], "a"):
        assert message(call(url, "POST", CORPORA, body))[0] == 400
    assert listed(url) == {}


def test_a_corpus_that_is_not_open_cannot_be_removed(url: str) -> None:
    add(url, "a")
    for name in ("nothing", "nothing..", "\N{SNOWMAN}", "a%2Fb", "%2e%2e%2fa", "x" * 300):
        assert message(call(url, "DELETE", f"{CORPORA}/{quote(name, safe='%')}"))[0] == 404
    assert listed(url) == {"a": "same"}


def test_a_corpus_that_does_not_exist_is_not_found(url: str) -> None:
    status, text = message(add(url, "nothing"))
    assert status == 404 and "build it with: specplug build corpus MODEL FILES... --out nothing" in text


def test_damaged_and_foreign_corpora_are_refused(url: str, folder: Path) -> None:
    path = folder / "b" / MANIFEST
    path.write_text(path.read_text().replace("0" * 64, "1" * 64))
    next((folder / "a").glob("*.tokens")).write_bytes(b"\0" * 8)
    assert message(add(url, "b"))[0] == 400
    status, text = message(add(url, "a"))
    assert status == 400 and "its SHA-256 is" in text and listed(url) == {}


def test_a_name_that_is_open_from_another_folder_is_kept(tmp_path: Path) -> None:
    write_corpus(tmp_path / "elsewhere" / "a", [[5]], END + 1)
    engine = ToyEngine(datastore=Datastore(corpora=[f"{tmp_path}/elsewhere/a/"]))
    with serving(engine, key=KEY) as url:
        status, text = message(add(url, "a"))
        assert status == 409 and "remove it first" in text and str(tmp_path) not in text
        assert call(url, "DELETE", f"{CORPORA}/a")[0] == 200 and add(url, "a")[0] == 201


def test_a_profile_without_the_method_has_no_corpora_to_change() -> None:
    with serving(ToyEngine(), key=KEY) as url:
        assert listed(url) == {}
        for answer in (add(url, "a"), call(url, "DELETE", f"{CORPORA}/a")):
            status, text = message(answer)
            assert status == 409 and "profile toy does not draft from corpora; start the server with --corpus" in text


# -- requests that name corpora ---------------------------------------------------------------------------------------


def ask(url: str, options: Any, path: str = CHAT) -> tuple[int, Any]:
    text: Any = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return call(url, "POST", path, {**text, "specplug": options})


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_what_a_request_asks_for_reaches_its_sequence(url: str, engine: ToyEngine, path: str) -> None:
    add(url, "a")
    add(url, "b")
    asked: list[Any] = [
        {},
        {"corpora": ["b"]},
        {"corpora": [], "private": True},
        {"corpora": ["a", "b"], "mode": "off"},
    ]
    assert [ask(url, options, path)[0] for options in asked] == [200] * 4
    assert engine.loop.options == [
        SequenceOptions(),
        SequenceOptions(("b",)),
        SequenceOptions((), private=True),
        SequenceOptions(("a", "b")),
    ]


def test_corpora_that_are_not_open_to_requests_are_refused(folder: Path) -> None:
    datastore = Datastore(corpora=["a", "b"], request_corpora=["b", "later"])
    engine = ToyEngine(datastore=datastore)
    with serving(engine, key=KEY) as url:
        for name in ("a", "later", "nothing", f"{folder}/b", ""):
            status, text = message(ask(url, {"corpora": ["b", name]}))
            assert (status, text) == (400, f"specplug.corpora: {name!r} is not open to requests; use b")
        assert not engine.loop.options
        entries = call(url, "GET", CORPORA)[1]["data"]
        assert [(entry["id"], entry["open_to_requests"]) for entry in entries] == [("a", False), ("b", True)]


def test_a_server_without_corpora_refuses_names_and_takes_none() -> None:
    with serving(ToyEngine(), key=KEY) as url:
        assert message(ask(url, {"corpora": ["a"]})) == (
            400,
            "specplug.corpora: 'a' is not open to requests; this server has none",
        )
        assert ask(url, {"corpora": []})[0] == 200


def test_malformed_options_are_refused(url: str) -> None:
    malformed: list[Any] = [{"corpora": "a"}, {"corpora": [1]}, {"corpora": ["a"] * 65}, {"corpora": {}}]
    for options in (*malformed, {"private": "maybe"}):
        status, text = message(ask(url, options))
        assert status == 400 and "specplug." in text
