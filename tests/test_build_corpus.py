"""Building corpora: what is read, what is kept, and what happens when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest

from specplug.build import corpus as building
from specplug.build.corpus import Request, build
from specplug.build.documents import Skipped, files_below, reads_ignore_files, texts
from specplug.core import IntArray, int_array
from specplug.corpora import folder, writing
from specplug.errors import UsageError
from specplug.tune import trace as traces
from specplug.tune.trace import Answer, Trace


def by_characters(several: Sequence[str]) -> list[IntArray]:
    return [int_array([ord(one) % 128 for one in text]) for text in several]


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A build whose tokens are characters, in folders of its own."""
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(building, "_open_tokenizer", lambda path: (by_characters, 128))
    source = tmp_path / "source"
    source.mkdir()
    return Request(model, "toy", (str(source),), tmp_path / "corpus", "corpus")


def write(request: Request, **files: str) -> Path:
    source = Path(request.sources[0])
    for name, text in files.items():
        (source / f"{name}.txt").write_text(text)
    return source


def held(out: Path) -> dict[str, str]:
    """The text of every document of a corpus."""
    manifest = folder.read_manifest(out)
    return {
        Path(document.name).name: "".join(map(chr, document.tokens.tolist()))
        for entry in manifest.shards
        for document in writing.documents_of(out, entry, manifest.num_tokens)
    }


# -- what is read ----------------------------------------------------------------------------------------------------


def test_files_that_are_no_text_are_skipped_and_counted(tmp_path: Path) -> None:
    for name, content in {
        "a.txt": b"text", "b.bin": b"\0\1", "c.txt": b"\xff\xfe\xfa", "d.txt": b" \n", "e.txt": b"\xef\xbb\xbfmark",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    skipped = Skipped()
    found = list(texts([str(tmp_path)], skipped))
    assert [(Path(one.name).name, one.text) for one in found] == [("a.txt", "text"), ("e.txt", "mark")]
    assert {reason: len(names) for reason, names in skipped.by_reason.items()} == {
        "binary": 1, "not UTF-8": 1, "empty": 1, "unreadable": 1,
    }  # fmt: skip
    assert "1 binary" in skipped.in_words() and "b.bin" in skipped.in_words()


def test_lines_of_json_are_documents(tmp_path: Path) -> None:
    lines = [
        json.dumps("plain"),
        json.dumps({"text": "t"}),
        json.dumps({"prompt": "p", "answer": "a", "id": "not read"}),
        json.dumps({"turns": ["one", "two"]}),
        json.dumps({"messages": [{"role": "user", "content": "u"}, {"content": [{"type": "text", "text": "v"}]}]}),
        "{broken",
        json.dumps("half a pair: \ud800"),
        json.dumps({"id": 5}),
        "",
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    skipped = Skipped()
    found = [one.text for one in texts([str(path)], skipped)]
    assert found == ["plain", "t", "p\n\na", "one\n\ntwo", "u\n\nv"]
    assert {reason: len(names) for reason, names in skipped.by_reason.items()} == {
        "damaged lines": 2, "lines without text": 1,
    }  # fmt: skip


def test_standard_input_is_a_document() -> None:
    (one,) = texts(["-"], Skipped(), standard_input=lambda: b"given")
    assert (one.name, one.text) == ("stdin", "given")


def test_a_pipe_is_not_read_twice(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="neither a file nor a folder; name -"):
        list(texts([str(tmp_path / "pipe")], Skipped()))
    assert not list(texts([str(tmp_path)], Skipped()))


def test_a_source_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read .No such file"):
        list(texts([str(tmp_path / "none")], Skipped()))


@pytest.mark.skipif(not reads_ignore_files(), reason="pathspec is not installed")
def test_ignored_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.log\n/build/\n!keep.log\n!\n")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / ".gitignore").write_text("secret.py\n!own.log\n")
    for name in (
        "a.py", "x.log", "keep.log", "build/out.py", ".git/config", ".hidden", "src/b.py", "src/secret.py",
        "src/own.log", "src/build/c.py", "node_modules/d.py", "secret.py",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path, Skipped())]
    assert found == ["a.py", "keep.log", "secret.py", "src/b.py", "src/own.log", "src/build/c.py"]
    inside = [path.name for path in files_below(tmp_path / "src", Skipped())]
    assert inside == ["b.py", "own.log", "c.py"], "the rules of the repository hold inside it, too"
    named = [path.name for path in files_below(tmp_path / "build", Skipped())]
    assert named == ["out.py"], "an ignored folder that the user names is read"
    patterns = [path.name for path in files_below(tmp_path, Skipped(), ("*.py",), ("src/*",))]
    assert patterns == ["a.py", "secret.py"]


# -- building --------------------------------------------------------------------------------------------------------


def test_a_corpus_holds_its_documents(request_: Request) -> None:
    write(request_, one="first", two="second")
    notes: list[str] = []
    document = build(replace(request_, licence="mine"), notify=notes.append)
    assert held(request_.out) == {"one.txt": "first", "two.txt": "second"}
    assert (document["tokens"], document["documents"], document["licence"]) == (5 + 6 + 2, 2, "mine")
    assert document["bytes"] == sum(path.stat().st_size for path in request_.out.iterdir())
    folder.check_files(request_.out)
    with pytest.raises(UsageError, match="exists already; --update adds"):
        build(request_)


def test_documents_beyond_the_limit_are_left_out(request_: Request) -> None:
    write(request_, a="x" * 50, b="y" * 50, c="z" * 50)
    document = build(replace(request_, max_tokens=80))
    assert document["tokens"] == 80 and held(request_.out) == {"a.txt": "x" * 50, "b.txt": "y" * 28}


def test_an_update_writes_only_the_shards_concerned(request_: Request) -> None:
    request_ = replace(request_, shard_tokens=40, include=("?.txt",))
    source = write(request_, a="a" * 35, b="b" * 35, c="c" * 35, d="d" * 5, secret="s")
    build(request_)
    everything = {path.name: path.stat().st_mtime_ns for path in request_.out.iterdir() if path.name != folder.MANIFEST}
    build(replace(request_, update=True, sources=(), include=()))
    unchanged = {path.name: path.stat().st_mtime_ns for path in request_.out.iterdir() if path.name != folder.MANIFEST}
    assert unchanged == everything, "nothing has changed"
    before = {path.name: path.stat().st_mtime_ns for path in request_.out.iterdir()}
    (source / "b.txt").write_text("B" * 30)
    (source / "c.txt").unlink()
    (source / "e.txt").write_text("e" * 3)
    build(replace(request_, update=True, sources=(), include=()))
    assert held(request_.out) == {"a.txt": "a" * 35, "b.txt": "B" * 30, "d.txt": "d" * 5, "e.txt": "e" * 3}
    after = {path.name: path.stat().st_mtime_ns for path in request_.out.iterdir()}
    kept = {name for name in before.keys() & after.keys() if before[name] == after[name]}
    assert len(kept) == 4, "the shard of a.txt stays as it is"
    folder.check_files(request_.out)
    with pytest.raises(UsageError, match="no corpus is there"):
        build(replace(request_, update=True, out=request_.out.parent / "other"))


def test_an_update_from_another_folder_reads_the_same_files(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(request_, a="text")
    monkeypatch.chdir(source.parent)
    build(replace(request_, sources=(source.name,)))
    monkeypatch.chdir("/")
    build(replace(request_, update=True, sources=()))
    assert held(request_.out) == {"a.txt": "text"}


def test_an_update_keeps_what_it_does_not_name(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(request_, a="text", secret="s")
    build(replace(request_, include=("?.txt",)))
    build(replace(request_, update=True))
    assert held(request_.out) == {"a.txt": "text"}, "the patterns of the earlier version hold"
    monkeypatch.setattr(building, "_recorded_answers", lambda model, notify: [])
    document = build(replace(request_, update=True, sources=(), answers=True))
    assert held(request_.out) == {"a.txt": "text"} and document["sources"] == (str(source), building.ANSWERS)


def test_a_folder_with_something_else_is_refused_before_anything_is_read(request_: Request) -> None:
    request_.out.mkdir()
    (request_.out / "mine").write_text("x")
    with pytest.raises(UsageError, match="exists and is no corpus"):
        build(replace(request_, sources=("/nowhere",)))


def test_an_update_of_standard_input_needs_sources(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_remembering_input", lambda: lambda: b"given")
    build(replace(request_, sources=("-",)))
    with pytest.raises(UsageError, match="built from standard input; name what it is to hold now"):
        build(replace(request_, update=True, sources=()))


def test_the_limit_counts_separators_and_can_be_raised(request_: Request) -> None:
    write(request_, a="a" * 200)
    small = replace(request_, shard_tokens=40, max_tokens=90)
    assert build(small)["tokens"] <= 90 and len(held(request_.out)["a.txt"]) == 9, "the last of three parts"
    document = build(replace(small, update=True, max_tokens=1000))
    assert document["tokens"] == 200 + document["documents"] == 206


def test_an_interrupted_update_goes_on_where_it_was(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    request_ = replace(request_, shard_tokens=40)
    source = write(request_, a="a" * 35)
    build(request_)
    for name in "bcd":
        (source / f"{name}.txt").write_text(name * 35)
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 1)
    tokenized = stopping_at(monkeypatch, "d")
    with pytest.raises(KeyboardInterrupt):
        build(replace(request_, update=True))
    assert held(request_.out) == {"a.txt": "a" * 35}, "what was published stays"
    tokenized.clear()
    stopping_at(monkeypatch, "-", tokenized)
    build(replace(request_, update=True, resume=True))
    assert {text[0] for text in tokenized} == {"c", "d"}, "neither what was published nor what was complete"
    assert {name[0] for name in held(request_.out)} == {*"abcd"}
    folder.check_files(request_.out)


def stopping_at(monkeypatch: pytest.MonkeyPatch, first: str, tokenized: list[str] | None = None) -> list[str]:
    """Tokenize until a text begins with `first`; returns the texts."""
    seen: list[str] = [] if tokenized is None else tokenized

    def tokenize(several: Sequence[str]) -> list[IntArray]:
        seen.extend(several)
        if several[0].startswith(first):
            raise KeyboardInterrupt
        return by_characters(several)

    monkeypatch.setattr(building, "_open_tokenizer", lambda path: (tokenize, 128))
    return seen


def test_a_long_document_is_complete_after_an_interruption(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    request_ = replace(request_, shard_tokens=40)
    write(request_, a="a" * 100, b="b")
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 1)
    stopping_at(monkeypatch, "b")
    with pytest.raises(KeyboardInterrupt):
        build(request_)
    stopping_at(monkeypatch, "-")
    assert build(replace(request_, resume=True))["tokens"] == 100 + 3 + 2


def test_an_update_with_another_tokenizer_is_refused(request_: Request) -> None:
    write(request_, a="text")
    build(request_)
    (request_.model / "tokenizer.json").write_text("{ }")
    with pytest.raises(UsageError, match="build another corpus with this model"):
        build(replace(request_, update=True))


def test_an_interrupted_build_goes_on_where_it_was(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    request_ = replace(request_, shard_tokens=40)
    write(request_, a="a" * 35, b="b" * 35, c="c" * 35)
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 1)
    tokenized = stopping_at(monkeypatch, "c")
    with pytest.raises(KeyboardInterrupt):
        build(request_)
    assert not (request_.out / folder.MANIFEST).exists() and (request_.out / folder.JOURNAL).exists()
    tokenized.clear()
    stopping_at(monkeypatch, "-", tokenized)
    build(replace(request_, resume=True))
    assert {text[0] for text in tokenized} == {"b", "c"}, "the shard with a was complete"
    assert held(request_.out) == {"a.txt": "a" * 35, "b.txt": "b" * 35, "c.txt": "c" * 35}
    assert not (request_.out / folder.JOURNAL).exists()
    assert len(list(request_.out.iterdir())) == 1 + 4 * 3


def test_without_resume_an_interrupted_build_starts_again(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    request_ = replace(request_, shard_tokens=40)
    write(request_, a="a" * 35, b="b" * 35, c="c" * 35)
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 1)
    stopping_at(monkeypatch, "c")
    with pytest.raises(KeyboardInterrupt):
        build(request_)
    tokenized = stopping_at(monkeypatch, "-")
    build(request_)
    assert {text[0] for text in tokenized} == {"a", "b", "c"} and len(list(request_.out.iterdir())) == 1 + 4 * 3


def test_two_builds_of_one_name_wait_for_each_other(request_: Request) -> None:
    write(request_, a="text")
    notes: list[str] = []
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom specplug.corpora.writing import folder_lock\n"
        f"with folder_lock(Path({str(request_.out)!r}), lambda: None):\n"
        "    print('held', flush=True)\n    time.sleep(1.5)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        began = monotonic()
        build(request_, notify=notes.append)
        assert monotonic() - began > 0.5
    assert notes[0] == "waiting for another process that changes corpus"
    assert held(request_.out) == {"a.txt": "text"}


def test_answers_that_tune_recorded_are_documents(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = {"bytes": 1, "sample_sha256": "x"}
    monkeypatch.setattr(building.fingerprint, "model_identity", lambda path: {"file": "m", **identity})
    none = np.zeros((1, 0), dtype=np.int32)
    answer = Answer("q1", 0, "kind", int_array([*range(20)]), int_array([65, 66]), none)
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "specplug" / traces.TRACES
    for name, model in (("mine", identity), ("other", {"bytes": 2, "sample_sha256": "y"})):
        traces.save(Trace({"model": model, "max_tokens": 2}, (answer,)), cache / f"{name}.npz")
    (cache / "damaged.npz").write_bytes(b"nothing")
    said: list[str] = []
    document = build(replace(request_, sources=(), answers=True), notify=said.append)
    assert [line for line in said if line.startswith("left out:") and "damaged.npz" in line]
    assert document["documents"] == 1 and document["sources"] == (building.ANSWERS,)
    (entry,) = folder.read_manifest(request_.out).shards
    (one,) = writing.documents_of(request_.out, entry, 128)
    assert one.name == "answer:q1:0" and one.tokens.tolist() == [*range(12, 20), 65, 66]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda request: replace(request, sources=()), "no documents: name files"),
        (lambda request: replace(request, sources=("/nowhere",)), "cannot be read .No such file"),
        (lambda request: request, "the documents hold no tokens"),
    ],
)
def test_bad_input_is_one_line(request_: Request, prepare: Callable[[Request], Request], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(prepare(request_))
    assert not (request_.out / folder.MANIFEST).exists()


# -- the commands, on the packaged model -----------------------------------------------------------------------------

SPECPLUG = str(Path(sys.executable).with_name("specplug"))


def call(*arguments: str, **further: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([SPECPLUG, *arguments], capture_output=True, timeout=300, **further)  # type: ignore[call-overload]


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.mark.llama
def test_the_commands_on_the_packaged_model(own_home: Path) -> None:
    pytest.importorskip("llama_cpp")
    text = "the quick brown fox jumps over the lazy dog and the lazy dog sleeps on\n"
    (own_home / "notes.md").write_text(20 * text)
    assert call("corpus", "list").stderr.startswith(b"specplug: no corpora yet; build one with")
    built = call("build", "corpus", "demo:smollm2", "notes.md", "-", "--json", cwd=own_home, input=b"and more text")
    assert built.returncode == 0, built.stderr.decode()
    document = json.loads(built.stdout)
    assert document["documents"] == 2 and b"the corpus is named notes" in built.stderr
    (listed,) = json.loads(call("corpus", "list", "--json").stdout)
    assert (listed["name"], listed["tokens"]) == ("notes", document["tokens"])
    assert b"notes" in call("corpus", "list").stdout
    shown = json.loads(call("corpus", "show", "notes", "--json").stdout)
    assert (
        shown["sources"] == [str(own_home / "notes.md"), "-"]
        and b"documents: 2" in call("corpus", "show", "notes").stdout
    )
    assert call("corpus", "check", "notes").returncode == 0
    grammar = own_home / "fox.gbnf"
    grammar.write_text(f'root ::= "{text.strip()}"\n')
    asked = ["run", "--grammar", str(grammar), "--max-tokens", "40", "--profile", "none", "Write it."]
    plain = call(*asked)
    drafted = call(*asked, "--corpus", "notes", "--json")
    answer = json.loads(drafted.stdout)
    assert plain.returncode == drafted.returncode == 0 and plain.stdout.decode() == answer["text"] + "\n"
    (shard,) = (
        path for path in (own_home / "XDG_DATA_HOME/specplug/corpora/notes").iterdir() if path.suffix == ".order"
    )
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\0")
    damaged = call("corpus", "check", "notes")
    assert damaged.returncode == 2 and shard.name.encode() in damaged.stderr
    assert call("corpus", "remove", "notes").returncode == 0
    gone = call("run", "--corpus", "notes", "Hi.")
    assert gone.returncode == 2 and b"no corpus is there" in gone.stderr
    for arguments in (["show", "notes"], ["check", "../x"], ["remove", "A B"]):
        done = call("corpus", *arguments)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr


@pytest.mark.llama
def test_ctrl_c_says_how_to_go_on(own_home: Path) -> None:
    pytest.importorskip("llama_cpp")
    (own_home / "long.txt").write_text("some words and more words " * 400_000)
    command = [SPECPLUG, "build", "corpus", "demo:smollm2", str(own_home / "long.txt"), "--out", "long"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        while b"reading" not in (line := running.stderr.readline()):
            assert line, "the build ended before it was interrupted"
        sleep(0.3)
        running.send_signal(signal.SIGINT)
        said = running.stderr.read()
    assert running.returncode == 130 and b"run the same command with --resume to continue" in said
    assert not (own_home / "XDG_DATA_HOME/specplug/corpora/long" / folder.MANIFEST).exists()
