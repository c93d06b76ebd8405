"""Drafting from corpora."""

from pathlib import Path

import pytest
from corpus_files import write_corpus

from specplug.core import EMPTY, Draft, Proposer, Step, int_array
from specplug.corpora import writing
from specplug.drafts.chains import ChainSteps
from specplug.errors import UsageError
from specplug.proposers.datastore import Datastore
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
    [{"corpora": []}, {"corpora": ["x"], "max_draft": 0}, {"corpora": ["x"], "min_prob": 2.0}, {"corpora": ["x", "x"]}],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="proposer datastore"):
        build_sources([ProposerSpec("datastore", options)])


def test_a_missing_corpus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="no corpus is there; build it with: specplug build corpus MODEL"):
        build_sources([ProposerSpec("datastore", {"corpora": ["nothing"]})])


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
