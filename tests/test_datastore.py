"""Drafting from corpora."""

import os
import weakref
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from corpus_files import write_corpus
from hypothesis import given
from hypothesis import strategies as st

from specplug.core import EMPTY, Draft, Proposer, SequenceOptions, Step, int_array
from specplug.corpora import writing
from specplug.corpora.folder import Corpus
from specplug.corpora.shard import Shard
from specplug.drafts.chains import ChainSteps
from specplug.errors import UsageError
from specplug.planning.cost import CostCurve
from specplug.planning.fusion import Fusion
from specplug.planning.speculator import Speculator
from specplug.profile import PlannerSettings, Profile
from specplug.proposers.datastore import Datastore, wait_for_corpora
from specplug.registry import ProposerSpec, build_sources
from specplug.testing import ProposerContract, ToyTarget, replay

TOY = ToyTarget(64, seed=7)


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpora") / "toy"
    write_corpus(folder, [TOY.greedy([n, n + 1], 80) for n in range(20)], 64)
    return f"{folder}/"


class TestContract(ProposerContract):
    @pytest.fixture(autouse=True)
    def _with_corpus(self, toy_corpus: str) -> None:
        self.corpus = toy_corpus

    def make(self) -> Proposer:
        return Datastore(corpora=[self.corpus])


X, Y, A, B, C = 10, 11, 1, 2, 3


def nodes(proposer: Datastore, draft: Draft) -> list[tuple[int, int, str]]:
    names = [proposer.buckets[bucket].name for bucket in draft.buckets.tolist()]
    return list(zip(draft.tokens.tolist(), draft.parents.tolist(), names, strict=True))


def corpus_of(folder: Path, *documents: list[int], num_tokens: int = 64) -> str:
    write_corpus(folder, documents, num_tokens)
    return f"{folder}/"


def started(proposer: Datastore, *prompt: int, seq: int = 0) -> Datastore:
    proposer.begin(seq, int_array(list(prompt)))
    return proposer


def test_the_draft_is_the_trie_of_what_followed_the_longest_match(tmp_path: Path) -> None:
    ref = corpus_of(tmp_path / "c", [A, B, C, X, 22], [A, B, C, Y, 23], [5, A, B, C, Y, 24], [B, C, 9])
    proposer = started(Datastore(corpora=[ref], min_prob=0.0), 20, A, B, C)
    assert nodes(proposer, proposer.propose(0, 2)) == [(Y, -1, "most 3"), (X, -1, "some 3")]
    draft = proposer.propose(0, 64)
    assert sorted(draft.tokens.tolist()) == [X, Y, 22, 23, 24], "9 follows a shorter match"
    proposer.observe(0, Step([Y], EMPTY, []))
    assert sorted(nodes(proposer, proposer.propose(0, 64))) == [(23, -1, "some 4"), (24, -1, "some 4")]


def test_a_chain_takes_the_token_that_most_occurrences_have_next(tmp_path: Path) -> None:
    """Of equally frequent ones the smallest id, also where the tree has a likelier path."""
    ref = corpus_of(tmp_path / "c", [A, B, X, 20, 21], [A, B, X, 22, 23], [A, B, Y, 30, 31], [A, B, Y, 30, 31])
    proposer = started(Datastore(corpora=[ref], min_prob=0.0), A, B)
    chains = proposer.propose_chains([0], 4)
    assert chains.tokens.tolist() == [[X, 20, 21, -1]]
    names = [proposer.buckets[bucket].name for bucket in chains.buckets[0].tolist()[:3]]
    assert names == ["some 2", "some 3", "one 4"]
    assert proposer.propose_chains([0], 0).tokens.shape == (1, 0)
    corpus_of(tmp_path / "d", [A, B, Y])
    both = started(Datastore(corpora=[ref, f"{tmp_path}/d/"], min_prob=0.0), A, B)
    assert both.propose_chains([0], 4).tokens.tolist() == [[Y, 30, 31, -1]]
    assert not (started(Datastore(corpora=[ref], min_prob=0.5), A, B).propose_chains([0], 4).tokens >= 0).any()


def test_nothing_is_drafted_after_the_end_of_a_document(tmp_path: Path) -> None:
    ref = corpus_of(tmp_path / "c", [A, B, C], [X, Y])
    proposer = started(Datastore(corpora=[ref]), A, B)
    assert proposer.propose(0, 8).tokens.tolist() == [C]
    proposer.observe(0, Step([C], EMPTY, []))
    assert len(proposer.propose(0, 8)) == 0


def test_several_corpora_and_shards_count_together(tmp_path: Path) -> None:
    one = corpus_of(tmp_path / "a", [A, B, C, X], [7, A, B, C, X])
    other = corpus_of(tmp_path / "b", [A, B, C, Y])
    proposer = started(Datastore(corpora=[one, other], min_prob=0.0), A, B, C)
    assert nodes(proposer, proposer.propose(0, 4)) == [(X, -1, "most 3"), (Y, -1, "some 3")]
    shorter = started(Datastore(corpora=[one, corpus_of(tmp_path / "c", [B, C, Y])], min_prob=0.0), A, B, C)
    assert nodes(shorter, shorter.propose(0, 4)) == [(X, -1, "few 3")], "only the longest match counts"


def test_a_sample_has_the_shares_of_all_occurrences(tmp_path: Path) -> None:
    documents = [[A, B, X]] * 900 + [[A, B, Y]] * 100
    proposer = started(Datastore(corpora=[corpus_of(tmp_path / "c", *documents)], min_prob=0.0), A, B)
    assert nodes(proposer, proposer.propose(0, 4)) == [(X, -1, "most 2"), (Y, -1, "rare 2")]


def test_unlikely_and_long_paths_are_cut(tmp_path: Path) -> None:
    ref = corpus_of(tmp_path / "c", list(range(40)))
    assert len(started(Datastore(corpora=[ref], max_draft=5), 0, 1, 2, 3, 4, 5, 6, 7).propose(0, 64)) == 5
    assert len(started(Datastore(corpora=[ref], min_prob=0.9), 0, 1).propose(0, 64)) == 0
    assert len(started(Datastore(corpora=[ref], min_match=3), 0, 1).propose(0, 64)) == 0


def test_a_text_of_the_corpus_is_drafted_far(toy_corpus: str) -> None:
    text = TOY.greedy([3, 4], 60)
    result = replay(Datastore(corpora=[toy_corpus]), [3, 4, *text[:4]], text[4:], 8)
    assert result.mean_acceptance_length > 3


def test_sequences_take_turns_where_there_are_many(toy_corpus: str) -> None:
    proposer = Datastore(corpora=[toy_corpus], lookups=3)
    text = TOY.greedy([3, 4], 30)
    for seq in range(7):
        started(proposer, *text[:20], seq=seq)
    asked = set()
    for step in range(3):
        chains = proposer.propose_chains(range(7), 4)
        drafted = {seq for seq in range(7) if chains.tokens[seq, 0] >= 0}
        assert len(drafted) == 3
        asked |= drafted
        token = text[20 + step]
        steps = ChainSteps([*range(7)], [[token]] * 7, int_array([0] * 7), int_array([token] * 7), int_array([]))
        proposer.observe_chains(steps)
    assert asked == set(range(7))


def test_state_of_a_sequence_is_bounded_and_gone_with_it(toy_corpus: str) -> None:
    proposer = started(Datastore(corpora=[toy_corpus]), *range(50))
    for token in TOY.greedy([3, 4], 500):
        proposer.observe(0, Step([token], EMPTY, []))
        proposer.propose(0, 4)
    text = proposer._texts[0]
    assert len(text.tail) <= 32 and len(text.places) == 1
    proposer.end(0)
    assert not proposer._texts


@pytest.mark.parametrize(
    "options",
    [
        {"corpora": [], "max_draft": 0},
        {"corpora": [], "min_prob": 2.0},
        {"corpora": ["x", "x"]},
        {"corpora": [], "corpora_for": "some"},
        {},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="proposer datastore"):
        build_sources([ProposerSpec("datastore", options)])


def test_a_missing_corpus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="no corpus is there; build it with: specplug build corpus MODEL"):
        build_sources([ProposerSpec("datastore", {"corpora": ["nothing"]})])


def test_two_corpora_of_one_name_are_refused(tmp_path: Path) -> None:
    refs = [corpus_of(tmp_path / folder / "same", [A, B]) for folder in "ab"]
    with pytest.raises(UsageError, match="same, same: two have one name"):
        build_sources([ProposerSpec("datastore", {"corpora": refs})])


def test_corpora_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    one = corpus_of(tmp_path / "a", [A, B])
    other = corpus_of(tmp_path / "b", [A, B])
    path = Path(other) / "corpus.json"
    path.write_text(path.read_text().replace("0" * 64, "1" * 64))
    with pytest.raises(UsageError, match="made with different tokenizers"):
        build_sources([ProposerSpec("datastore", {"corpora": [one, other]})])


def test_a_corpus_that_is_removed_while_it_is_used_still_drafts(tmp_path: Path) -> None:
    ref = corpus_of(tmp_path / "c", [A, B, C])
    proposer = started(Datastore(corpora=[ref]), A)
    writing.remove(Path(ref))
    proposer.observe(0, Step([B], EMPTY, []))
    assert proposer.propose(0, 4).tokens.tolist() == [C]


# -- corpora that change, and sequences that choose -------------------------------------------------------------------


def drafted(proposer: Datastore, seq: int = 0) -> list[int]:
    return sorted(proposer.propose(seq, 8).tokens.tolist())


@pytest.fixture
def two(tmp_path: Path) -> tuple[Corpus, Corpus]:
    """After A and B, the corpus `x` has X and the corpus `y` has Y."""
    return write_corpus(tmp_path / "x", [[A, B, X]], 64), write_corpus(tmp_path / "y", [[A, B, Y]], 64)


def test_without_corpora_nothing_is_drafted() -> None:
    proposer = started(Datastore(corpora=[]), A, 1_000_000, B)
    assert drafted(proposer) == [] and proposer.offered == []
    assert proposer.propose_chains([0], 4).tokens.tolist() == [[-1] * 4]


def test_running_sequences_follow_a_change_of_corpora(two: tuple[Corpus, Corpus]) -> None:
    x, y = two
    proposer = started(Datastore(corpora=[]), A, B)
    proposer.use_corpora([x])
    assert drafted(proposer) == [X]
    proposer.use_corpora([x, y])
    assert drafted(proposer) == [X, Y]
    proposer.observe(0, Step([Y], EMPTY, []))
    proposer.observe(0, Step([A, B], EMPTY, []))
    proposer.use_corpora([y])
    assert drafted(proposer) == [Y] and drafted(started(proposer, A, B, seq=1), seq=1) == [Y]
    assert len(proposer._texts[0].places) == 1
    proposer.use_corpora([])
    assert drafted(proposer) == [] and not proposer._texts[0].places


def test_a_change_that_is_refused_changes_nothing(two: tuple[Corpus, Corpus]) -> None:
    x, y = two
    proposer = started(Datastore(corpora=[]), A, B)
    proposer.use_corpora([x])
    other = replace(y, manifest=replace(y.manifest, tokenizer="1" * 64))
    for wrong in ([x, x], [x, other]):
        with pytest.raises(ValueError, match="corpora: x"):
            proposer.use_corpora(wrong)
    assert proposer.shared_corpora == (x,) and drafted(proposer) == [X]


def test_the_maps_of_a_removed_corpus_are_closed(tmp_path: Path) -> None:
    proposer = started(Datastore(corpora=[corpus_of(tmp_path / "x", [A, B, X])]), A, B)
    assert drafted(proposer) == [X]
    shard = weakref.ref(proposer.shared_corpora[0].shards[0])
    proposer.use_corpora([])
    assert shard() is None


def test_a_corpus_of_a_smaller_vocabulary_can_be_added(tmp_path: Path) -> None:
    """Ids that it does not have end what is searched for; they are in the texts of running sequences already."""
    large = write_corpus(tmp_path / "large", [[A, B, 60, A, B, X]], 64)
    small = write_corpus(tmp_path / "small", [[A, B, Y]], 32)
    proposer = started(Datastore(corpora=[], min_match=1, min_prob=0.0), A, B, 60, seq=0)
    started(proposer, 60, A, B, seq=1)
    proposer.use_corpora([large])
    assert [drafted(proposer, seq)[-1] for seq in (0, 1)] == [X, X]
    proposer.use_corpora([small])
    assert [drafted(proposer, seq) for seq in (0, 1)] == [[], [Y]]
    proposer.observe(0, Step([A, 60, B], EMPTY, []))
    assert drafted(proposer) == [Y]


def asking(proposer: Datastore, seq: int, corpora: tuple[str, ...] | None) -> Datastore:
    proposer.configure(seq, SequenceOptions(corpora))
    return started(proposer, A, B, seq=seq)


def test_each_sequence_drafts_from_the_corpora_that_it_names(two: tuple[Corpus, Corpus]) -> None:
    proposer = Datastore(corpora=[])
    proposer.use_corpora(two)
    for seq, names in enumerate((None, ("x",), ("y",), ("x", "y"), (), ("z",))):
        asking(proposer, seq, names)
    assert [drafted(proposer, seq) for seq in range(6)] == [[X, Y], [X], [Y], [X, Y], [], []]
    proposer.use_corpora(two[1:])
    assert [drafted(proposer, seq) for seq in range(6)] == [[Y], [], [Y], [Y], [], []]
    proposer.end(1)
    assert drafted(started(proposer, A, B, seq=1), seq=1) == [Y], "its choice has ended with it"


def test_sequences_that_name_nothing_get_nothing_where_tenants_share(two: tuple[Corpus, Corpus]) -> None:
    proposer = Datastore(corpora=[], corpora_for="asking")
    proposer.use_corpora(two)
    asking(proposer, 0, None)
    asking(proposer, 1, ("y",))
    started(proposer, A, B, seq=2)
    assert [drafted(proposer, seq) for seq in range(3)] == [[], [Y], []]


def test_only_allowed_corpora_can_be_named(two: tuple[Corpus, Corpus]) -> None:
    proposer = Datastore(corpora=[], request_corpora=["y", "later"])
    proposer.use_corpora(two)
    assert proposer.offered == ["y"]
    assert drafted(asking(proposer, 0, ("x", "y")), 0) == [Y]
    assert drafted(asking(proposer, 1, None), 1) == [X, Y]


def test_sequences_without_corpora_take_no_turns(two: tuple[Corpus, Corpus]) -> None:
    proposer = Datastore(corpora=[], lookups=2)
    proposer.use_corpora(two)
    for seq in range(6):
        asking(proposer, seq, ("x",) if seq > 3 else ())
    assert proposer.propose_chains(range(6), 1).tokens.tolist() == [[-1]] * 4 + [[X]] * 2


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("pool")
    return [write_corpus(folder / f"c{n}", [TOY.greedy([seed, 5 + n], 40) for seed in range(4)], 64) for n in range(3)]


@given(st.data())
def test_any_order_of_changes_drafts_as_a_fresh_proposer(pool: list[Corpus], data: Any) -> None:
    """After every change, drafts equal those of a proposer that never knew other corpora."""
    seed = data.draw(st.integers(0, 3))
    changing = Datastore(corpora=[], min_prob=0.0)
    tokens = TOY.greedy([seed, 5], 40)
    started(changing, *tokens[:2])
    for at in range(2, 20):
        if data.draw(st.booleans()):
            changing.use_corpora(data.draw(st.lists(st.sampled_from(pool), unique_by=lambda corpus: corpus.name)))
        fresh = Datastore(corpora=[], min_prob=0.0)
        fresh.use_corpora(changing.shared_corpora)
        started(fresh, *tokens[:at])
        assert nodes(changing, changing.propose(0, 8)) == nodes(fresh, fresh.propose(0, 8))
        changing.observe(0, Step([tokens[at]], EMPTY, []))


def test_a_change_of_corpora_keeps_what_was_learned_of_acceptance(two: tuple[Corpus, Corpus]) -> None:
    proposer = Datastore(corpora=[])
    proposer.use_corpora(two[:1])
    cost = CostCurve([0], [1, 64], [[50.0, 51.0]])
    speculator = Speculator(Fusion([proposer]), cost, Profile("p", planner=PlannerSettings(mode="static")))
    for seq in range(8):
        speculator.begin(seq, int_array([A, B]))
        draft = speculator.plan([seq], 2, [4])[0]
        assert draft.tokens.tolist() == [X]
        speculator.observe([seq], [Step([X, A], draft, [0])], target_ms=51.0)
        speculator.end(seq)
    learned = list(speculator.table.probability)
    assert learned != [bucket.prior for bucket in proposer.buckets]
    proposer.use_corpora(two[1:])
    speculator.begin(9, int_array([A, B]))
    assert speculator.plan([9], 2, [4])[0].tokens.tolist() == [Y]
    assert speculator.table.probability == learned


def test_a_large_shard_is_not_searched_until_its_files_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "a", [[1, 2, 3, 4]], 50)
    go_on = Event()
    read = Shard._read

    def slow(self: Shard, done: Event | None = None) -> None:
        go_on.wait(20)
        read(self, done)

    monkeypatch.setattr("specplug.corpora.shard.LOADED_AT_ONCE", 0)
    monkeypatch.setattr(Shard, "_read", slow)
    proposer, other = (Datastore(corpora=[f"{tmp_path / 'a'}/"]) for _ in range(2))
    for one in (proposer, other):
        one.begin(0, int_array([1, 2]))
        assert not len(one.propose(0, 4))
    go_on.set()
    wait_for_corpora([proposer, other])
    assert [one.propose(0, 1).tokens.tolist() for one in (proposer, other)] == [[3], [3]]


def test_a_small_corpus_is_ready_at_once(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a", [[1, 2, 3, 4]], 50)
    assert all(shard.loaded.is_set() for shard in corpus.shards)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_reads_files_that_its_parent_is_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM forks its engine; threads of the parent do not go on in it."""
    write_corpus(tmp_path / "a", [[1, 2, 3, 4]], 50)
    go_on, read = Event(), Shard._read

    def slow(self: Shard, done: Event | None = None) -> None:
        go_on.wait(20)
        read(self, done)

    monkeypatch.setattr("specplug.corpora.shard.LOADED_AT_ONCE", 0)
    monkeypatch.setattr(Shard, "_read", slow)
    Datastore(corpora=[f"{tmp_path / 'a'}/"])
    monkeypatch.setattr(Shard, "_read", read)
    child = os.fork()
    if not child:
        proposer = Datastore(corpora=[f"{tmp_path / 'a'}/"])
        ready = all(shard.loaded.wait(10) for corpus in proposer.shared_corpora for shard in corpus.shards)
        os._exit(0 if ready else 1)
    go_on.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
