"""Corpora on disk: search against brute force, writing, damage."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from corpus_files import manifest_of, write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specplug.core import int_array
from specplug.corpora import folder, writing
from specplug.corpora.matching import LONGEST, Text, longest_match
from specplug.corpora.shard import Shard, encoded, widths
from specplug.corpora.suffix_order import has_library, suffix_order
from specplug.errors import SpecplugError, UsageError
from specplug.models.corpus_fit import check_fits

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)

WAYS = [False, *([True] if has_library() else [])]
"""Sorting with NumPy, and with the library where it is installed."""


def following(end: Sequence[int], documents: Sequence[Sequence[int]]) -> list[list[int]]:
    """By brute force: what follows each occurrence of `end` in the documents."""
    return [
        list(document[at + len(end) :])
        for document in documents
        for at in range(len(document) - len(end) + 1)
        if list(document[at : at + len(end)]) == list(end)
    ]


def longest_end(text: Sequence[int], documents: Sequence[Sequence[int]], least: int) -> int:
    """By brute force: the length of the longest end of `text` that occurs in the documents."""
    lengths = range(min(LONGEST, len(text)), least - 1, -1)
    return next((length for length in lengths if following(text[len(text) - length :], documents)), 0)


@pytest.mark.parametrize("library", WAYS)
@pytest.mark.parametrize("vocabulary", [3, 60_000, 70_000, 300_000])
def test_suffixes_are_sorted(library: bool, vocabulary: int) -> None:
    random = np.random.default_rng(vocabulary)
    tokens = random.choice(random.integers(0, vocabulary, 12), 400).astype(np.int32)
    tokens[100:190] = tokens[300:390]
    order = suffix_order(tokens, library=library)
    assert order.dtype == np.uint32 and sorted(order.tolist()) == list(range(400))
    suffixes = [tokens[start:].tolist() for start in order.tolist()]
    assert all(one < other for one, other in pairwise(suffixes)), "by all of their tokens"
    assert suffix_order(tokens[:0], library=library).tolist() == []
    assert suffix_order(np.zeros(100, dtype=np.int32), library=library).tolist() == [*range(99, -1, -1)]


@pytest.mark.parametrize("num_tokens", [50, 65_535, 65_536, 200_000])
def test_ids_are_stored_in_the_fewest_bytes(tmp_path: Path, num_tokens: int) -> None:
    """The separator is no id, also for the largest vocabulary of 16 bits."""
    corpus = write_corpus(tmp_path / "c", [[0, num_tokens - 1, 1], [num_tokens - 1, 2]], num_tokens)
    (shard,) = corpus.shards
    assert shard.how.num_bytes == (2 if num_tokens < 65_536 else 4) and shard.how.separator >= num_tokens
    low, high = shard.find(encoded([num_tokens - 1], shard.how), num_tokens - 1)
    assert sorted(shard.following((low, high), 1, 8, 3).tolist()) == [[1, -1, -1], [2, -1, -1]]


@SHARED_FOLDER
@given(
    documents=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=60), min_size=1, max_size=6),
    text=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    least=st.integers(1, 4),
    shard_tokens=st.sampled_from([64, 1000]),
    ids=st.sampled_from([(0, 1, 2, 3, 4), (7, 65_535, 70_000, 130_000, 131_000)]),
    library=st.sampled_from(WAYS),
)
def test_matches_are_those_of_a_brute_force_search(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    text: list[int],
    least: int,
    shard_tokens: int,
    ids: tuple[int, ...],
    library: bool,
) -> None:
    """For all lengths, at borders of documents, in several shards, also with ids beyond 65,535; token by token."""
    num_tokens = max(ids) + 1
    named = [[ids[token] for token in document] for document in documents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "suffix_order", partial(suffix_order, library=library))
        corpus = write_corpus(tmp_path_factory.mktemp("c") / "c", named, num_tokens, shard_tokens=shard_tokens)
    running = Text(num_tokens)
    where = corpus.folder
    held = [
        [d.tokens.tolist() for d in writing.documents_of(where, entry, num_tokens)] for entry in corpus.manifest.shards
    ]
    for at, token in enumerate(text):
        running.append([ids[token]])
        if at % 3 == 1 and at + 1 < len(text):
            continue  # several tokens arrive at once
        known = [ids[one] for one in text[: at + 1]]
        for shard, inside in zip(corpus.shards, held, strict=True):
            length, interval = longest_match(running, shard, least)
            assert min(length, LONGEST) == longest_end(known, inside, least)
            # A match that is followed becomes longer than the longest search.
            expected = following(known[len(known) - length :], inside) if length else []
            rows = shard.following(interval, length, 1000, 4).tolist() if length else []
            assert bool(rows) == bool(length)
            assert sorted(rows) == sorted([*one[:4], *[-1] * (4 - len(one[:4]))] for one in expected)


def test_a_token_outside_the_vocabulary_breaks_every_match(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3, 4]], 10)
    text = Text(10)
    for tokens, expected in (([1, 2], 2), ([99], 0), ([3], 0), ([-1, 1, 2, 3], 3), ([4], 4)):
        text.append(tokens)
        assert longest_match(text, corpus.shards[0], 2)[0] == expected


def test_of_many_occurrences_an_evenly_spaced_sample_is_taken(tmp_path: Path) -> None:
    """Half of 1,000 occurrences continue with 9, which is not among the first ones in the order."""
    documents = [[1, 2, 3 + n % 5] for n in range(500)] + [[1, 2, 9]] * 500
    (shard,) = write_corpus(tmp_path / "c", documents, 16).shards
    interval = shard.find(encoded([1, 2], shard.how), 1)
    assert interval[1] - interval[0] == 1000
    rows = shard.following(interval, 2, 64, 2)
    assert rows.shape == (64, 2) and 31 <= int((rows[:, 0] == 9).sum()) <= 33 and (rows[:, 1] == -1).all()
    assert (np.diff(rows[:, 0]) >= 0).all()


def test_documents_are_divided_into_shards(tmp_path: Path) -> None:
    documents = [[n % 7] * 10 for n in range(9)] + [list(range(8)) * 10]
    corpus = write_corpus(tmp_path / "c", documents, 10, shard_tokens=34)
    sizes = [entry.tokens for entry in corpus.manifest.shards]
    assert max(sizes) <= 34 and sum(sizes) == 9 * 11 + 80 + 3, "the last document is cut into three"
    assert corpus.manifest.size == sum(sizes) and len(corpus.shards) == len(sizes)
    (where,) = tmp_path.iterdir()
    assert stat_mode(where) == 0o700 and all(stat_mode(path) == 0o600 for path in where.iterdir())


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "c", [[1, 2, 3], [4, 5]], 10)
    return tmp_path / "c"


def test_a_truncated_or_edited_file_is_named(corpus: Path) -> None:
    folder.check_files(corpus)
    (entry,) = folder.read_manifest(corpus).shards
    for ending in (*folder.ENDINGS, folder.DOCUMENTS):
        path = corpus / f"{entry.stem}.{ending}"
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:3] + bytes([whole[3] ^ 1]) + whole[4:]):
            path.write_bytes(damaged)
            with pytest.raises(UsageError, match=rf"{entry.stem}.{ending}: its SHA-256 is \w+, the manifest says \w+"):
                folder.check_files(corpus)
        path.write_bytes(whole)
    (corpus / f"{entry.stem}.order").write_bytes(b"12345678")
    with pytest.raises(UsageError, match=r"damaged .* build the corpus again"):
        folder.open_corpus(f"{corpus}/")
    (corpus / f"{entry.stem}.tokens").unlink()
    with pytest.raises(UsageError, match="No such file"):
        folder.open_corpus(f"{corpus}/")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "not a manifest of schema 1"),
        ({"tokenizer": 5}, "tokenizer is missing or has the wrong type"),
        ({"num_tokens": 0}, "num_tokens 0 is no size"),
        ({"sources": [1]}, "sources are not texts"),
        ({"sources": ["a\0b"]}, "sources are not texts"),
        ({"model": "\ud800"}, "a text cannot be printed"),
        ({"settings": {"include": 5}}, "settings: include is no list"),
        ({"settings": {"exclude": [5]}}, "settings: exclude is no list"),
        ({"settings": {"max_tokens": "x"}}, "settings: max_tokens is no number"),
        ({"shards": [1]}, "a shard has other keys"),
        ({"stem": "../../etc/passwd"}, "is no name of a shard"),
        ({"stem": "a/b"}, "is no name of a shard"),
        ({"tokens": -1}, "its numbers are wrong"),
        ({"hashes": {}}, "its hashes are missing"),
        ({"hashes": dict.fromkeys((*folder.ENDINGS, folder.DOCUMENTS), 5)}, "a hash is not one of SHA-256"),
    ],
)
def test_a_damaged_manifest_is_refused(corpus: Path, change: dict[str, object], message: str) -> None:
    path = corpus / folder.MANIFEST
    data = json.loads(path.read_text())
    place = data["shards"][0] if change.keys() & {"stem", "tokens", "hashes"} else data
    path.write_text(json.dumps(data | change) if place is data else json.dumps(data))
    if place is not data:
        place.update(change)
        path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        folder.open_corpus(f"{corpus}/")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_json_is_refused(corpus: Path, content: bytes) -> None:
    (corpus / folder.MANIFEST).write_bytes(content)
    with pytest.raises(UsageError, match=folder.MANIFEST):
        folder.open_corpus(f"{corpus}/")


def test_a_corpus_of_another_tokenizer_is_refused_with_both_hashes(corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    own = sha256(b"{}").hexdigest()
    with pytest.raises(UsageError, match=rf"its tokenizer is 000000000000, that of {model} {own[:12]}"):
        check_fits(f"{corpus}/", model)
    manifest = corpus / folder.MANIFEST
    manifest.write_text(manifest.read_text().replace("0" * 64, own))
    check_fits(f"{corpus}/", model)
    (model / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 9}}))
    with pytest.raises(UsageError, match=rf"its vocabulary has 10 tokens, that of {model} 9"):
        check_fits(f"{corpus}/", model)


def test_what_is_no_file_is_not_waited_for(corpus: Path) -> None:
    (entry,) = folder.read_manifest(corpus).shards
    for name in (f"{entry.stem}.starts", f"{entry.stem}.tokens", folder.MANIFEST):
        (corpus / name).unlink()
        os.mkfifo(corpus / name)
        with pytest.raises(UsageError, match=r"No such file|no corpus is there"):
            folder.open_corpus(f"{corpus}/")


def test_pipes_are_not_hashed(corpus: Path) -> None:
    (entry,) = folder.read_manifest(corpus).shards
    (corpus / f"{entry.stem}.documents").unlink()
    os.mkfifo(corpus / f"{entry.stem}.documents")
    with pytest.raises(UsageError, match="no such file"):
        folder.check_files(corpus)
    with pytest.raises(UsageError, match="no such file"):
        writing.listed_documents(corpus, entry)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[[1]]", b"[5]", b'[["a", "b", 0, 99, 99]]', b'[["a", "b", "x", 1, 1]]', b"[" * 100_000]
)
def test_a_damaged_list_of_documents_is_refused(corpus: Path, content: bytes) -> None:
    """Also where its hash is right."""
    (entry,) = folder.read_manifest(corpus).shards
    (corpus / f"{entry.stem}.documents").write_bytes(content)
    hostile = replace(entry, hashes={**entry.hashes, "documents": sha256(content).hexdigest()})
    with pytest.raises(UsageError, match="damaged"):
        list(writing.documents_of(corpus, hostile, 10))


@pytest.mark.parametrize(
    "left", [(), (folder.JOURNAL,), (f".{folder.JOURNAL}.x1",), (f".{folder.MANIFEST}.x1", folder.JOURNAL)]
)
def test_what_a_killed_process_left_can_be_built_over_and_removed(corpus: Path, left: tuple[str, ...]) -> None:
    for again in (True, False):
        (corpus / folder.MANIFEST).unlink()
        for name in left:
            (corpus / name).write_text("{")
        if again:
            write_again(corpus)
            assert len(list(corpus.iterdir())) == 5
        else:
            writing.remove(corpus)
    assert not corpus.exists()


def test_links_that_lead_to_each_other_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (
        pytest.raises((UsageError, SpecplugError)),
        writing.folder_lock(tmp_path / "loop", lambda: None),
    ):
        raise AssertionError


def test_folders_with_other_names_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for name in ("good", "Bad"):
        write_corpus(folder.corpora_folder() / name, [[1, 2]], 10)
    (folder.corpora_folder() / "half").mkdir()
    (folder.corpora_folder() / "half" / folder.JOURNAL).write_text("{}")
    assert folder.names() == ["good", "half"]


def test_starts_that_do_not_ascend_are_refused(corpus: Path) -> None:
    (entry,) = folder.read_manifest(corpus).shards
    path = corpus / f"{entry.stem}.starts"
    starts = np.fromfile(path, dtype="<u4")
    for damaged in (np.where(np.arange(len(starts)) == 3, 9, starts), starts[:-1], starts + 1):
        damaged.astype("<u4").tofile(path)
        with pytest.raises(UsageError, match="do not fit"):
            folder.open_corpus(f"{corpus}/")
    path.write_bytes(starts.astype("<u4").tobytes()[:-1])
    with pytest.raises(UsageError, match="damaged"):
        folder.open_corpus(f"{corpus}/")


def test_an_id_that_is_no_token_ends_a_continuation(corpus: Path) -> None:
    (entry,) = folder.read_manifest(corpus).shards
    path = corpus / f"{entry.stem}.tokens"
    path.write_bytes(path.read_bytes().replace(b"\0\3", b"\0\x63"))
    (shard,) = folder.open_corpus(f"{corpus}/").shards
    assert shard.following(shard.find(encoded([1, 2], shard.how), 1), 2, 4, 2).tolist() == [[-1, -1]]


def test_a_corpus_that_is_replaced_while_it_is_opened_is_opened_again(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = folder.read_manifest, []

    def read_then_replace(where: Path, *rest: object, **further: object) -> folder.Manifest:
        manifest = real(where, *rest, **further)  # type: ignore[arg-type]
        if not calls:
            calls.append(where)
            write_again(corpus)
        return manifest

    monkeypatch.setattr(folder, "read_manifest", read_then_replace)
    opened = folder.open_corpus(f"{corpus}/")
    assert opened.manifest == real(corpus) and len(opened.shards) == 1


def write_again(corpus: Path, tokens: Sequence[int] = (7, 8)) -> None:
    with writing.writing(corpus, manifest_of(10), shard_tokens=100) as writer:
        writer.add(writing.Document.complete("new", "new", int_array(list(tokens))))
        writer.publish(["test"])


@pytest.mark.parametrize("ref", ["A", "", "-x", "a b", "x" * 101, "."])
def test_a_name_is_no_path(ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    if ref == ".":
        assert folder.place(ref) == Path(".")
        return
    with pytest.raises(UsageError, match="no name of a corpus"):
        folder.place(ref)


def test_files_that_do_not_fit_one_another_are_refused(corpus: Path) -> None:
    (entry,) = folder.read_manifest(corpus).shards
    with pytest.raises(ValueError, match="do not fit"):
        Shard(corpus / entry.stem, 11)
    (corpus / f"{entry.stem}.tokens").write_bytes(b"")
    with pytest.raises(ValueError):
        Shard(corpus / entry.stem, 10)


# -- writing ---------------------------------------------------------------------------------------------------------


def test_an_open_corpus_outlives_its_removal(corpus: Path) -> None:
    opened = folder.open_corpus(f"{corpus}/")
    writing.remove(corpus)
    assert not corpus.exists()
    text = Text(10)
    text.append([1, 2])
    length, interval = longest_match(text, opened.shards[0], 2)
    assert length == 2 and opened.shards[0].following(interval, 2, 4, 2).tolist() == [[3, -1]]
    with pytest.raises(UsageError, match="no corpus is there"):
        writing.remove(corpus)


def test_publishing_removes_the_files_of_earlier_shards(corpus: Path) -> None:
    before = {path.name for path in corpus.iterdir()}
    write_again(corpus)
    after = {path.name for path in corpus.iterdir()}
    assert before & after == {folder.MANIFEST} and len(after) == 5


def test_a_corpus_that_is_written_again_does_not_disturb_its_readers(corpus: Path) -> None:
    """Also where the contents are the same: files are never written in place."""
    opened = folder.open_corpus(f"{corpus}/")
    before = opened.shards[0].order.tolist()
    with writing.writing(corpus, manifest_of(10), shard_tokens=1 << 20) as writer:
        for number, tokens in enumerate(([1, 2, 3], [4, 5])):
            writer.add(writing.Document.complete(f"d{number}", f"{number}", int_array(tokens)))
        writer.publish(["test"])
    (entry,) = folder.read_manifest(corpus).shards
    assert entry.stem != opened.manifest.shards[0].stem and opened.shards[0].order.tolist() == before


def test_other_files_are_left_alone(corpus: Path, tmp_path: Path) -> None:
    for name in ("my.tokens", "list.documents", "building.json", "README"):
        (corpus / name).write_text("mine")
    write_again(corpus)
    writing.remove(corpus)
    assert {path.name for path in corpus.iterdir()} == {"my.tokens", "list.documents", "building.json", "README"}
    mode = stat_mode(corpus)
    with pytest.raises(UsageError, match="exists and is no corpus; name a new folder"):
        write_again(corpus)
    assert stat_mode(corpus) == mode and len(list(corpus.iterdir())) == 4
    with pytest.raises(UsageError, match="no corpus is there"):
        writing.remove(corpus)


def test_a_corpus_behind_a_link_is_removed(corpus: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(corpus)
    writing.remove(link)
    assert not corpus.exists()


@pytest.mark.parametrize("tokens", [(7, 8), (1, 2, 3)])
def test_a_full_disk_is_one_line_and_keeps_the_old_corpus(
    corpus: Path, tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in corpus.iterdir()}
    real = os.fsync
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(SpecplugError, match=r"cannot be written .No space left on device.; complete shards are kept"):
        write_again(corpus, tokens)
    assert {path.name: path.read_bytes() for path in corpus.iterdir()} == before


def test_a_corpus_without_tokens_is_not_written(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="the documents hold no tokens"),
        writing.writing(tmp_path / "c", manifest_of(10), shard_tokens=100) as writer,
    ):
        writer.add(writing.Document.complete("empty", "", int_array([])))
        writer.publish(["test"])


def test_a_library_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydivsufsort", SimpleNamespace())
    with pytest.raises(SpecplugError, match="pydivsufsort does not load"):
        suffix_order(np.arange(4), library=True)


def test_widths_leave_room_for_the_separator() -> None:
    assert widths(65_535).num_bytes == 2 and widths(65_536).num_bytes == 4
