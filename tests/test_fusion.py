from collections.abc import Sequence
from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.core import (
    EMPTY,
    NO_OPTIONS,
    ROOT,
    BatchProposer,
    Bucket,
    Draft,
    IntArray,
    Proposer,
    Requires,
    SequenceOptions,
    Step,
    int_array,
)
from specplug.drafts.chains import TreeAdapter
from specplug.planning.batch_speculator import BatchSpeculator
from specplug.planning.cost import BatchCost, CostCurve
from specplug.planning.fusion import Drafts, Fusion
from specplug.proposers.suffix import Suffix
from specplug.proposers.token_recycling import TokenRecycling
from specplug.testing import ProposerContract, ToyTarget, replay

Path = tuple[int, ...]


class Scripted:
    """Always returns the same draft, cut to the budget; records all calls."""

    def __init__(self, draft: Draft, priors: Sequence[float] = (0.5,), topk: int = 0, hidden: bool = False) -> None:
        self.draft = draft
        self.requires = Requires(topk, hidden)
        self.buckets = tuple(Bucket(f"bucket {i}", prior) for i, prior in enumerate(priors))
        self.calls: list[object] = []

    def begin(self, seq: int, prompt: IntArray) -> None:
        self.calls.append(("begin", seq, prompt.tolist()))

    def propose(self, seq: int, budget: int) -> Draft:
        self.calls.append(("propose", seq, budget))
        return self.draft.select(range(min(budget, len(self.draft))))

    def observe(self, seq: int, step: Step) -> None:
        self.calls.append(("observe", seq, step))

    def end(self, seq: int) -> None:
        self.calls.append(("end", seq))


class Other(Scripted):
    """Another class, so that the names differ."""


class TestContract(ProposerContract):
    def make(self) -> Proposer:
        return Fusion([Suffix(), TokenRecycling()])

    def make_bounded(self) -> Proposer:
        return Fusion([Suffix(shared_tokens=500), TokenRecycling()])


class TestContractOfOne(ProposerContract):
    def make(self) -> Proposer:
        return Fusion([TokenRecycling()])


def paths(draft: Draft) -> list[Path]:
    found: list[Path] = []
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        found.append((*(() if parent == ROOT else found[parent]), token))
    return found


def trie(wanted: Sequence[Path], bucket: int = 0) -> Draft:
    """The tree of all prefixes of `wanted`, in order of first mention."""
    nodes = list(dict.fromkeys(path[:end] for path in wanted for end in range(1, len(path) + 1)))
    place = {path: i for i, path in enumerate(nodes)} | {(): ROOT}
    return Draft.of([path[-1] for path in nodes], [place[path[:-1]] for path in nodes], [bucket] * len(nodes))


# -- merging ---------------------------------------------------------------------------------------------------------


def test_worked_example_of_the_longest_prefix_merge() -> None:
    """RASD: a retrieved path shares nodes while its tokens agree, then its rest is appended.

    Of the tree 1-2, 1-3, 4 and the path 1-3-5-6 the nodes 1 and 3 are shared, and 5-6 is appended to 3.
    """
    tree = Draft.of([1, 2, 3, 4], [ROOT, 0, 0, ROOT], [0, 0, 0, 0])
    fusion = Fusion([Scripted(tree), Other(Draft.chain([1, 3, 5, 6], [0] * 4))])
    draft = fusion.propose(0, 10)
    draft.check(num_buckets=len(fusion.buckets))
    assert draft.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert draft.parents.tolist() == [ROOT, 0, 0, ROOT, 2, 4]


def test_the_same_token_elsewhere_is_another_node() -> None:
    fusion = Fusion([Scripted(Draft.chain([1, 2], [0, 0])), Other(Draft.chain([2, 1], [0, 0]))])
    assert paths(fusion.propose(0, 10)) == [(1,), (1, 2), (2,), (2, 1)]


some_paths = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), max_size=8)


@given(st.lists(some_paths, min_size=1, max_size=4))
def test_merging_is_the_union_of_the_paths(sources: list[list[Path]]) -> None:
    fusion = Fusion([Scripted(trie(wanted)) for wanted in sources])
    draft = fusion.propose(0, 1000)
    draft.check(num_buckets=len(fusion.buckets))
    union = {path[:end] for wanted in sources for path in wanted for end in range(1, len(path) + 1)}
    assert sorted(paths(draft)) == sorted(union)
    for path, bucket in zip(paths(draft), draft.buckets.tolist(), strict=True):
        drafted_by = [i for i, wanted in enumerate(sources) if any(p[: len(path)] == path for p in wanted)]
        assert fusion.bucket_source[bucket] in drafted_by
        assert fusion.buckets[bucket].name.endswith(", agreed") == (len(drafted_by) > 1)


@given(
    st.lists(some_paths, min_size=2, max_size=3),
    st.integers(0, 20),
    st.lists(st.floats(0.05, 0.95), min_size=3, max_size=3),
)
def test_the_cut_keeps_the_likeliest_subtree(sources: list[list[Path]], budget: int, priors: list[float]) -> None:
    """The proposers ignore the budget, so that only the fusion cuts."""
    parts = [Scripted(trie(wanted), [prior]) for wanted, prior in zip(sources, priors, strict=False)]
    for part in parts:
        part.propose = lambda seq, budget, part=part: part.draft  # type: ignore[method-assign, misc]
    fusion = Fusion(parts)
    if sum(1 for part in parts if len(part.draft)) < 2:
        return
    complete, cut = fusion.propose(0, 1000), fusion.propose(0, budget)
    cut.check(num_buckets=len(fusion.buckets))
    assert len(cut) == min(budget, len(complete))
    assert sorted(probabilities(fusion, cut), reverse=True) == pytest.approx(
        sorted(probabilities(fusion, complete), reverse=True)[:budget]
    )
    assert set(paths(cut)) <= set(paths(complete))


def probabilities(fusion: Fusion, draft: Draft) -> list[float]:
    found: list[float] = []
    for parent, bucket in zip(draft.parents.tolist(), draft.buckets.tolist(), strict=True):
        found.append(fusion.buckets[bucket].prior * (1.0 if parent == ROOT else found[parent]))
    return found


def test_the_cut_follows_the_learned_acceptance() -> None:
    """The path probabilities 0.9 and 0.81 beat 0.5 and 0.25, until others were learned."""
    fusion = Fusion(
        [Scripted(Draft.chain([1, 2], [0, 0]), [0.9]), Other(Draft.chain([3, 4], [0, 0]), [0.5])],
    )
    assert paths(fusion.propose(0, 2)) == [(1,), (1, 2)]
    fusion.probability = [0.2, 0.2, 0.95, 0.95]
    assert paths(fusion.propose(0, 2)) == [(3,), (3, 4)]


# -- buckets ---------------------------------------------------------------------------------------------------------


def test_buckets_alone_and_agreed() -> None:
    fusion = Fusion([Scripted(EMPTY, [0.5, 0.2]), Other(EMPTY, [0.8])])
    assert [bucket.name for bucket in fusion.buckets] == [
        "Scripted bucket 0",
        "Scripted bucket 1",
        "Scripted bucket 0, agreed",
        "Scripted bucket 1, agreed",
        "Other bucket 0",
        "Other bucket 0, agreed",
    ]
    assert fusion.bucket_source.tolist() == [0, 0, 0, 0, 1, 1]
    assert fusion.bucket_source.dtype == np.int32
    priors = [bucket.prior for bucket in fusion.buckets]
    for alone, agreed in ((0, 2), (1, 3), (4, 5)):
        assert priors[alone] < priors[agreed] < 1.0


def test_an_agreed_node_has_the_more_probable_bucket() -> None:
    weak, strong = Draft.chain([1, 2], [0, 0]), Draft.chain([1, 3], [0, 0])
    for first, second, expected in ((0.3, 0.8, 1), (0.8, 0.3, 0)):
        fusion = Fusion([Scripted(weak, [first]), Other(strong, [second])])
        draft = fusion.propose(0, 10)
        assert fusion.bucket_source[draft.buckets].tolist() == [expected, 0, 1]
        names = [fusion.buckets[bucket].name.endswith(", agreed") for bucket in draft.buckets.tolist()]
        assert names == [True, False, False]


def test_three_proposers_agree_on_one_node() -> None:
    one = Draft.chain([1], [0])
    fusion = Fusion([Scripted(one, [p]) for p in (0.2, 0.6, 0.4)])
    draft = fusion.propose(0, 10)
    assert draft.tokens.tolist() == [1]
    assert fusion.buckets[int(draft.buckets[0])].name == "Scripted 1 bucket 0, agreed"


def test_a_single_proposer_keeps_its_own_buckets_and_draft() -> None:
    source = Scripted(Draft.chain([1, 2], [0, 1]), [0.5, 0.4])
    fusion = Fusion([source])
    assert fusion.buckets == source.buckets
    assert fusion.bucket_source.tolist() == [0, 0]
    source.propose = lambda seq, budget: source.draft  # type: ignore[method-assign]
    assert fusion.propose(0, 5) is source.draft


# -- which proposers are called --------------------------------------------------------------------------------------


def propose_all(
    fusion: Fusion, seqs: Sequence[int], budgets: Sequence[int], active: Sequence[Sequence[int]], spent_ns: list[int]
) -> list[Draft]:
    """One merged draft for each of `seqs`; per proposer the places for which it is asked, the last proposer first."""
    found: list[Drafts] = [[] for _ in seqs]
    for index in reversed(range(len(active))):
        fusion.ask(index, seqs, budgets, active[index], found, spent_ns)
    return fusion.merge(found, budgets)


def test_only_active_proposers_are_asked() -> None:
    one, two = Scripted(Draft.chain([1], [0])), Other(Draft.chain([2], [0]))
    fusion = Fusion([one, two])
    spent_ns = [0, 0]
    (draft,) = propose_all(fusion, [3], [7], [(), (0,)], spent_ns)
    assert paths(draft) == [(2,)]
    assert one.calls == []
    assert two.calls == [("propose", 3, 7)]
    assert spent_ns[0] == 0 < spent_ns[1]
    assert propose_all(fusion, [3], [7], [(), ()], spent_ns) == [EMPTY]


def test_each_proposer_is_asked_for_its_sequences_only() -> None:
    one, two = Scripted(Draft.chain([1], [0])), Other(Draft.chain([2], [0]))
    fusion = Fusion([one, two], clock=count(step=100).__next__)
    spent_ns = [0, 5]
    drafts = propose_all(fusion, [8, 9, 7], [3, 4, 5], [(0, 2), (1, 2)], spent_ns)
    assert [paths(draft) for draft in drafts] == [[(1,)], [(2,)], [(1,), (2,)]]
    assert one.calls == [("propose", 8, 3), ("propose", 7, 5)]
    assert two.calls == [("propose", 9, 4), ("propose", 7, 5)]
    assert spent_ns == [100, 105], "the clock is read twice per proposer, not per sequence"


class ScriptedBatch(Scripted):
    """Also drafts for several sequences in one call."""

    def propose_batch(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[Draft]:
        self.calls.append(("propose_batch", list(seqs), list(budgets)))
        return [self.draft.select(range(min(budget, len(self.draft)))) for budget in budgets]


def test_a_batch_proposer_is_called_once_for_all_its_sequences() -> None:
    one, two = ScriptedBatch(Draft.chain([1, 2], [0, 0])), Scripted(Draft.chain([1, 3], [0, 0]))
    assert isinstance(one, BatchProposer) and not isinstance(two, BatchProposer)
    drafts = propose_all(Fusion([one, two]), [8, 9, 7], [1, 4, 4], [(0, 2), range(3)], [0, 0])
    assert [paths(draft) for draft in drafts] == [[(1,)], [(1,), (1, 3)], [(1,), (1, 2), (1, 3)]]
    assert one.calls == [("propose_batch", [8, 7], [1, 4])]
    assert two.calls == [("propose", 8, 1), ("propose", 9, 4), ("propose", 7, 4)]


def test_a_single_draft_has_buckets_of_the_fusion() -> None:
    fusion = Fusion([Scripted(EMPTY, [0.5, 0.4]), Other(Draft.chain([2, 3], [0, 1]), [0.3, 0.2])])
    draft = fusion.propose(0, 5)
    assert [fusion.buckets[bucket].name for bucket in draft.buckets.tolist()] == [
        "Other bucket 0",
        "Other bucket 1",
    ]


def test_all_proposers_observe_every_step() -> None:
    one, two = Scripted(Draft.chain([1], [0])), Other(EMPTY)
    fusion = Fusion([one, two])
    fusion.begin(4, int_array([8, 9]))
    step = Step([1, 5], propose_all(fusion, [4], [3], [(0,), ()], [0, 0])[0], [0])
    fusion.observe(4, step)
    fusion.end(4)
    assert one.calls == [("begin", 4, [8, 9]), ("propose", 4, 3), ("observe", 4, step), ("end", 4)]
    assert two.calls == [("begin", 4, [8, 9]), ("observe", 4, step), ("end", 4)]


def test_requirements_are_the_union() -> None:
    fusion = Fusion([Scripted(EMPTY, topk=4), Other(EMPTY, topk=8), Scripted(EMPTY, hidden=True)])
    assert fusion.requires == Requires(topk=8, hidden=True)


def test_recycling_learns_the_rows_of_other_proposers_drafts() -> None:
    recycling = TokenRecycling(k=2)
    fusion = Fusion([Scripted(Draft.chain([1, 2], [0, 0])), recycling])
    fusion.begin(0, int_array([9]))
    fusion.observe(0, Step([5], fusion.propose(0, 8), [], int_array([[5, 6], [11, 12], [21, 22]])))
    assert recycling.shared_matrix[[9, 1, 2]].tolist() == [[5, 6], [11, 12], [21, 22]]


# -- acceptance ------------------------------------------------------------------------------------------------------


def test_accepts_at_least_as_much_as_either_proposer() -> None:
    """With room for both drafts the merged tree contains every path of either."""
    target = ToyTarget(64, seed=3)
    prompt = target.prompt(24)
    text = target.greedy(prompt.tolist(), 300)

    def topk(tokens: Sequence[int]) -> IntArray:
        return target.topk(tokens, 8)

    def length(proposer: Proposer, budget: int) -> float:
        return replay(proposer, prompt, text, budget, topk).mean_acceptance_length

    alone = max(length(Suffix(), 8), length(TokenRecycling(), 8))
    fused = length(Fusion([Suffix(), TokenRecycling()]), 16)
    assert fused >= alone >= 1.5


class Configured(Scripted):
    def configure(self, seq: int, options: SequenceOptions) -> None:
        self.calls.append(("configure", seq, options))


def test_options_reach_the_proposers_that_take_them_before_a_sequence_begins() -> None:
    asked = SequenceOptions(("a",), private=True)
    plain, configured, chains = (kind(EMPTY) for kind in (Scripted, Configured, Configured))
    fusion = Fusion([plain, configured])
    fusion.begin(3, int_array([5]), asked)
    fusion.begin(4, int_array([6]))
    adapters = [TreeAdapter(plain), TreeAdapter(chains)]
    speculator = BatchSpeculator(adapters, ["plain", "chains"], BatchCost({1: CostCurve([0], [1], [[1.0]])}), k=1)
    speculator.begin(3, int_array([5]), asked)
    speculator.begin(4, int_array([6]))
    begun = [("begin", 3, [5]), ("begin", 4, [6])]
    both = [("configure", 3, asked), begun[0], ("configure", 4, NO_OPTIONS), begun[1]]
    assert configured.calls == chains.calls == both and plain.calls == begun * 2
