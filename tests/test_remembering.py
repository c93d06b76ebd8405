"""Memory between runs: what is kept of answers, its bounds, several processes, and how it comes back."""

import json
import stat
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpus_files import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from specplug import profile as profiles
from specplug.core import int_array
from specplug.corpora import folder
from specplug.corpora.answer_memory import LARGEST_SHARD, Memory, answer_document
from specplug.corpora.folder import LEARNED, check_files, place, read_manifest
from specplug.corpora.writing import documents_of, folder_lock, remove
from specplug.engines import remembering as module
from specplug.engines.remembering import Remembered, remembering
from specplug.errors import SpecplugError, UsageError
from specplug.profile import Profile, Remember
from specplug.profile.with_corpora import corpora_of
from specplug.proposers.datastore import Datastore
from specplug.registry import ProposerSpec

NUM_TOKENS = 1000
TOKENIZER = "a" * 64


def memory_at(path: Path, **changes: object) -> Memory:
    return replace(Memory(f"{path}/", "toy", "one", TOKENIZER, NUM_TOKENS, 1 << 16), **changes)


def kept(memory: Memory) -> list[list[int]]:
    """The tokens of all answers in a memory, the oldest first."""
    found = []
    for entry in read_manifest(memory.folder).shards:
        found += [document.tokens.tolist() for document in documents_of(memory.folder, entry, NUM_TOKENS)]
    return found


def some_answer(seed: int, length: int = 50) -> list[int]:
    return np.random.default_rng(seed).integers(0, NUM_TOKENS, length).tolist()


def added(memory: Memory, *answers: Sequence[int]) -> None:
    memory.add([int_array(list(answer)) for answer in answers])


# -- the corpus ------------------------------------------------------------------------------------------------------


def test_answers_come_back_in_order_and_only_once(tmp_path: Path) -> None:
    memory = memory_at(tmp_path / "m")
    assert not memory.check()
    added(memory, [1, 2, 3], [4, 5], [1, 2, 3], [])
    added(memory, [4, 5], [6])
    assert memory.check() and kept(memory) == [[4, 5], [1, 2, 3], [6]]
    check_files(memory.folder)


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    memory = memory_at(tmp_path / "m")
    added(memory, [])
    assert not memory.folder.exists() or not folder.exists(memory.folder)
    added(memory, [1, 2])
    before = {path.name: path.stat().st_mtime_ns for path in memory.folder.iterdir()}
    added(memory, [1, 2])
    assert {path.name: path.stat().st_mtime_ns for path in memory.folder.iterdir()} == before


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 900), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_the_newest_answers_stay_within_the_bound(
    lengths: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    memory = memory_at(tmp_path_factory.mktemp("m") / "m", max_tokens=2048)
    answers = [some_answer(100 * seed + number, length) for number, length in enumerate(lengths)]
    for answer in answers:
        added(memory, answer)
        manifest = read_manifest(memory.folder)
        assert manifest.size <= 2048
        # Halving sizes from the largest on, and as many of the largest as fit.
        assert len(manifest.shards) <= 16
        texts = ["".join(f"{token}," for token in one) for one in kept(memory)]
        assert f"{'|'.join(texts)}".replace("|", "").endswith("".join(f"{token}," for token in answer))
    total, newest = 0, []
    for answer in reversed(answers):
        total += len(answer) + len(answer) // 511 + 1
        if total > 2048 * 2 // 3 - 900:
            break
        newest.insert(0, answer)
    flat = [token for one in kept(memory) for token in one]
    wanted = [token for one in newest for token in one]
    assert flat[len(flat) - len(wanted) :] == wanted


@settings(max_examples=30, deadline=None)
@given(batches=st.lists(st.lists(st.integers(1, 1500), min_size=1, max_size=12), min_size=1, max_size=5))
def test_batches_stay_within_the_bound_and_end_with_the_newest(
    batches: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    memory = memory_at(tmp_path_factory.mktemp("m") / "m", max_tokens=2048)
    for number, lengths in enumerate(batches):
        answers = [some_answer(50 * number + place, length) for place, length in enumerate(lengths)]
        added(memory, *answers)
        manifest = read_manifest(memory.folder)
        assert manifest.size <= 2048 and len(manifest.shards) <= 16
        flat = [token for one in kept(memory) for token in one]
        assert flat[-len(answers[-1]) :] == answers[-1]


def test_an_answer_that_is_longer_than_the_bound_leaves_its_end(tmp_path: Path) -> None:
    memory = memory_at(tmp_path / "m", max_tokens=1024)
    answer = some_answer(1, 3000)
    added(memory, [1, 2, 3], answer)
    flat = [token for one in kept(memory) for token in one]
    assert read_manifest(memory.folder).size <= 1024 and len(flat) > 1000 and answer[-len(flat) :] == flat


def test_an_answer_that_is_repeated_as_its_shard_is_dropped_stays(tmp_path: Path) -> None:
    memory = memory_at(tmp_path / "m", max_tokens=1024)
    for number in range(6):
        added(memory, some_answer(number, 200))
        oldest = kept(memory)[0]
    added(memory, oldest, some_answer(99, 400))
    assert oldest in kept(memory)


@pytest.mark.parametrize(("first", "second"), [(100, 120), (120, 100), (60_000, 70_000)])
def test_models_with_one_tokenizer_and_other_vocabularies_share_a_memory_or_are_refused(
    tmp_path: Path, first: int, second: int
) -> None:
    one, two = (memory_at(tmp_path / "m", num_tokens=size, identity=f"{size}") for size in (first, second))
    added(one, [1, 2, first - 1])
    if second < first:
        with pytest.raises(UsageError, match="its vocabulary has"):
            added(two, [3])
        return
    added(two, [4, 5], [6, second - 1])  # the second one has an id that the memory cannot hold
    manifest = read_manifest(one.folder)
    assert manifest.num_tokens == first
    found = [d.tokens.tolist() for entry in manifest.shards for d in documents_of(one.folder, entry, first)]
    assert found == [[1, 2, first - 1], [4, 5]]
    folder.open_corpus(one.ref)


def test_a_build_that_was_interrupted_is_left_alone(tmp_path: Path) -> None:
    memory = memory_at(tmp_path / "m")
    write_corpus(memory.folder, [[1, 2, 3]], NUM_TOKENS)
    (memory.folder / folder.MANIFEST).rename(memory.folder / folder.JOURNAL)
    before = {path.name for path in memory.folder.iterdir()}
    with pytest.raises(UsageError, match="was interrupted"):
        added(memory, [4])
    assert {path.name for path in memory.folder.iterdir()} == before


def test_damage_is_found_at_the_start_and_says_what_can_be_done(tmp_path: Path) -> None:
    memory = memory_at(tmp_path / "m")
    added(memory, [1, 2])
    (entry,) = read_manifest(memory.folder).shards
    (memory.folder / f"{entry.stem}.documents").write_text("[]")
    with pytest.raises(UsageError, match=r"specplug corpus remove .* forgets the answers"):
        memory.check()


def test_another_process_is_waited_for_a_limited_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specplug.corpora.answer_memory.LOCK_SECONDS", 0.1)
    memory, waited = memory_at(tmp_path / "m"), []
    with folder_lock(memory.folder, lambda: None), pytest.raises(SpecplugError, match="another process has held"):
        memory.add([int_array([1])], lambda: waited.append(True))
    assert waited == [True]
    added(memory, [1])
    assert kept(memory) == [[1]]


def test_few_shards_hold_many_answers(tmp_path: Path) -> None:
    memory = memory_at(tmp_path / "m", max_tokens=1 << 20)
    for number in range(60):
        added(memory, some_answer(number))
    manifest = read_manifest(memory.folder)
    assert manifest.documents == 60 and len(manifest.shards) <= 8
    assert all(shard.tokens <= LARGEST_SHARD for shard in manifest.shards)
    assert len(list(memory.folder.iterdir())) == 1 + 4 * len(manifest.shards)  # nothing of replaced shards is left


def test_files_are_private(tmp_path: Path) -> None:
    memory = memory_at(tmp_path / "m")
    added(memory, [1, 2])
    memory.keep_learned({"a": (1, 2)})
    assert {stat.S_IMODE(path.stat().st_mode) for path in memory.folder.iterdir()} == {0o600}
    assert stat.S_IMODE(memory.folder.stat().st_mode) == 0o700


def test_another_tokenizer_is_refused_with_both_hashes(tmp_path: Path) -> None:
    memory = memory_at(tmp_path / "m")
    added(memory, [1, 2])
    other = replace(memory, tokenizer="b" * 64)
    for use in (other.check, lambda: added(other, [3])):
        with pytest.raises(UsageError, match=r"its tokenizer is aaaaaaaaaaaa, that of toy bbbbbbbbbbbb"):
            use()
    assert kept(memory) == [[1, 2]]


def test_a_corpus_of_documents_is_not_added_to(tmp_path: Path) -> None:
    write_corpus(tmp_path / "built", [[1, 2, 3]], NUM_TOKENS)
    memory = memory_at(tmp_path / "built", tokenizer="0" * 64)
    with pytest.raises(UsageError, match="built from documents"):
        added(memory, [4])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no corpus"):
        added(memory_at(tmp_path / "foreign"), [4])
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["note.txt"]


def test_processes_that_add_at_once_lose_nothing(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys
        from specplug.core import int_array
        from specplug.corpora.answer_memory import Memory
        memory = Memory({f"{tmp_path / 'm'}/"!r}, "toy", "one", {TOKENIZER!r}, {NUM_TOKENS}, 65536)
        for number in range(10):
            memory.add([int_array([int(sys.argv[1]), number, 7])])
    """)
    running = [subprocess.Popen([sys.executable, "-c", script, str(number)]) for number in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert sorted(kept(memory_at(tmp_path / "m"))) == [[a, b, 7] for a in range(3) for b in range(10)]


def test_an_interrupted_addition_leaves_the_answers_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    memory = memory_at(tmp_path / "m")
    added(memory, [1, 2])
    with monkeypatch.context() as patched:
        patched.setattr("specplug.corpora.writing.CorpusWriter.publish", full)
        with pytest.raises(SpecplugError, match="cannot be written"):
            added(memory, [3, 4])
    assert kept(memory) == [[1, 2]]
    added(memory, [5, 6])
    assert kept(memory) == [[1, 2], [5, 6]]


# -- what was learned ------------------------------------------------------------------------------------------------


def test_acceptance_is_kept_per_model(tmp_path: Path) -> None:
    one, two = memory_at(tmp_path / "m"), memory_at(tmp_path / "m", identity="two")
    one.keep_learned({"a": (1, 2)})
    assert one.learned() == {}  # there is no memory yet
    added(one, [1, 2])
    one.keep_learned({"a": (1, 2), "b": (3, 4)})
    two.keep_learned({"a": (9, 9)})
    one.keep_learned({"b": (5.5, 6)})
    added(one, [3])
    assert (one.learned(), two.learned()) == ({"a": (1, 2), "b": (5.5, 6)}, {"a": (9, 9)})
    remove(one.folder)
    assert not one.folder.exists() and one.learned() == {}


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"schema": 2, "models": {"one": {"a": [1, 2]}}}', '{"schema": 1, "models": {"one": {"a": [1]}}}',
     '{"schema": 1, "models": {"one": {"a": [1, -2]}}}', '{"schema": 1, "models": {"one": {"a": [1, NaN]}}}',
     '{"schema": 1, "models": 5}', "[" * 100_000],
)  # fmt: skip
def test_damaged_counts_are_not_read(tmp_path: Path, content: str) -> None:
    memory = memory_at(tmp_path / "m")
    added(memory, [1, 2])
    (memory.folder / LEARNED).write_text(content)
    assert memory.learned() == {}
    memory.keep_learned({"a": (1, 2)})
    assert memory.learned() == {"a": (1, 2)}


def test_the_number_of_models_is_bounded(tmp_path: Path) -> None:
    memory = memory_at(tmp_path / "m")
    added(memory, [1, 2])
    for number in range(30):
        memory_at(tmp_path / "m", identity=f"{number}").keep_learned({"a": (number, 0)})
    models = json.loads((memory.folder / LEARNED).read_text())["models"]
    assert list(models) == [f"{number}" for number in range(14, 30)]


# -- a profile that remembers ----------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(module, "tokenizer_hash", lambda path: TOKENIZER)
    monkeypatch.setattr(module, "vocabulary_size", lambda path: NUM_TOKENS)
    path = tmp_path / "toy.gguf"
    path.write_bytes(b"weights")
    return path


def remember_in(profile: Profile, model: Path, said: list[str], prompt: list[int], answer: list[int]) -> Profile:
    """The profile that a process drafted with, which remembered one answer."""
    with remembering(profile, lambda: model, said.append) as remembered:
        remembered.take(int_array(prompt), answer, {"a": (4, 1)})
        return remembered.profile


def test_the_second_process_drafts_what_the_first_one_answered(model: Path) -> None:
    said: list[str] = []
    profile = Profile("p", remember=Remember("notes"))
    prompt, answer = list(range(100, 120)), list(range(200, 230))
    assert corpora_of(remember_in(profile, model, said, prompt, answer)) == []
    assert said == [
        "remembering answers in corpus notes (0 tokens so far); forget them with: specplug corpus remove notes"
    ]
    with remembering(profile, lambda: model, said.append) as remembered:
        assert corpora_of(remembered.profile) == ["notes"] and remembered.learned() == {"a": (4, 1)}
        assert [spec.method for spec in remembered.profile.proposers] == ["suffix", "token_recycling", "datastore"]
    assert "(39 tokens so far)" in said[1]
    drafts = Datastore(corpora=["notes"])
    drafts.begin(0, int_array([*prompt, 200]))
    assert drafts.propose(0, 4).tokens.tolist() == answer[1:5]


@pytest.mark.parametrize(("prompts", "length"), [(False, 8 + 30), (True, 20 + 30)])
def test_a_prompt_is_kept_where_that_is_asked_for(model: Path, prompts: bool, length: int) -> None:
    profile = Profile("p", remember=Remember("notes", prompts=prompts))
    remember_in(profile, model, [], list(range(100, 120)), list(range(200, 230)))
    assert read_manifest(place("notes")).size == length + 1


def test_corpora_of_the_profile_stay(model: Path) -> None:
    write_corpus(place("docs"), [[1, 2, 3]], NUM_TOKENS)
    profile = Profile("p", proposers=(ProposerSpec("datastore", {"corpora": ["docs"]}),), remember=Remember("notes"))
    remember_in(profile, model, [], [1], [2])
    assert corpora_of(remember_in(profile, model, [], [1], [2])) == ["docs", "notes"]


@pytest.mark.parametrize(
    ("profile", "is_reported"),
    [
        (Profile("p", proposers=(ProposerSpec("none"),)), False),
        (Profile("p", engine="vllm", proposers=(ProposerSpec("draft_model", {"model": "x"}),)), True),
    ],
)
def test_a_method_that_works_alone_stays(model: Path, profile: Profile, is_reported: bool) -> None:
    said: list[str] = []
    profile = replace(profile, remember=Remember("notes"))
    remember_in(profile, model, [], [1], [2])
    assert remember_in(profile, model, said, [1], [3]).proposers == profile.proposers
    assert any("answers are only kept" in line for line in said) is is_reported
    assert read_manifest(place("notes")).documents == 2


def test_without_remember_nothing_is_touched(model: Path) -> None:
    def never() -> Path:
        raise AssertionError

    with remembering(Profile("p"), never, pytest.fail) as remembered:
        remembered.take(int_array([1]), [2], {})
        assert remembered.learned() is None and not remembered.write()
    assert not folder.names()


def test_answers_are_kept_after_an_interruption(model: Path) -> None:
    profile = Profile("p", remember=Remember("notes"))
    with pytest.raises(KeyboardInterrupt), remembering(profile, lambda: model, lambda text: None) as remembered:
        remembered.take(int_array([1]), [2, 3], {})
        raise KeyboardInterrupt
    assert kept(memory_at(place("notes"))) == [[1, 2, 3]]


def test_a_problem_of_the_disk_is_reported_and_ends_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with (
        remembering(Profile("p", remember=Remember("notes")), lambda: model, said.append) as remembered,
        monkeypatch.context() as patched,
    ):
        remembered.take(int_array([1]), [2], {})
        patched.setattr("specplug.corpora.writing._write", full)
        assert [remembered.write() for _ in range(3)] == [False] * 3
        problem = f"{place('notes')}: cannot be written (No space left on device); the answers before are kept"
        assert said[1:] == [f"not remembered: {problem}"]
        patched.undo()
        remembered.take(int_array([1]), [3], {})
        assert remembered.write() and kept(memory_at(place("notes"))) == [[1, 2], [1, 3]]


def test_a_corpus_of_the_same_name_elsewhere_is_refused(model: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "notes", [[1, 2, 3]], NUM_TOKENS)
    spec = ProposerSpec("datastore", {"corpora": [f"{tmp_path / 'notes'}/"]})
    with pytest.raises(UsageError, match=r"remember notes: corpus .* has the same name"):
        Remembered(Profile("p", proposers=(spec,), remember=Remember("notes")), lambda: model, lambda text: None)


def test_a_memory_that_is_named_as_a_corpus_too_may_be_new(model: Path) -> None:
    spec = ProposerSpec("datastore", {"corpora": ["notes"]})
    profile = Profile("p", proposers=(ProposerSpec("suffix"), spec), remember=Remember("notes"))
    assert remember_in(profile, model, [], [1], [2]).proposers == (ProposerSpec("suffix"),)
    assert corpora_of(remember_in(profile, model, [], [1], [2])) == ["notes"]


def test_a_model_without_the_size_of_its_vocabulary_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "vocabulary_size", lambda path: None)
    with pytest.raises(UsageError, match="size of the vocabulary"):
        Remembered(Profile("p", remember=Remember("notes")), lambda: model, lambda text: None)


def test_what_is_kept_of_an_answer() -> None:
    prompt = int_array(list(range(20)))
    assert answer_document(prompt, [7, 8], prompts=False).tolist() == [*range(12, 20), 7, 8]
    assert answer_document(prompt, [7, 8], prompts=True).tolist() == [*range(20), 7, 8]
    assert answer_document(prompt[:0], [7], prompts=False).dtype == np.int32


# -- in a profile's file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "remember"),
    [
        ("remember: notes", Remember("notes")),
        ("remember: {corpus: notes, prompts: true, max_tokens: 5000}", Remember("notes", True, 5000)),
        ("remember: null", None),
    ],
)
def test_a_profile_names_what_it_remembers(text: str, remember: Remember | None) -> None:
    profile = profiles.loads(f"schema: 1\nname: p\n{text}\n", "p.yaml")
    assert profile.remember == remember
    assert profiles.loads(profiles.dumps(profile), "p.yaml") == profile


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("remember: ../up", "remember.corpus: '../up' is not a name"),
        ("remember: {prompts: true}", "remember.corpus: missing"),
        ("remember: 5", "remember: 5 is not a mapping"),
        ("remember: {corpus: a, max_tokens: 10}", "remember.max_tokens: 10 is out of range"),
    ],
)
def test_what_a_profile_cannot_remember_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        profiles.loads(f"schema: 1\nname: p\n{text}\n", "p.yaml")
    assert problem in str(caught.value)
