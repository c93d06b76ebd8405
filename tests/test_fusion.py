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
    DraftAdvice,
    IntArray,
    Likeliest,
    Proposer,
    Requires,
    SequenceOptions,
    Step,
    int_array,
)
from specplug.drafts.chains import TreeAdapter
from specplug.planning.batch_speculator import BatchSpeculator
from specplug.planning.constants import JUDGED_TOP
from specplug.planning.cost import BatchCost, CostCurve
from specplug.planning.fused_buckets import BANDS
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
    return fusion.merge(seqs, found, budgets)


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


# -- tokens that a model has judged -----------------------------------------------------------------------------------


class Judging(Scripted):
    """A model-based proposer that finds tokens likely, by place of its chain; None answers nothing."""

    retry_ms = 0.0

    def __init__(
        self, draft: Draft, likely: Sequence[dict[int, float]] | None, priors: Sequence[float] = (0.5,)
    ) -> None:
        super().__init__(draft, priors)
        self.likely = likely
        self.passes = 0
        self.advice: DraftAdvice | None = None
        self.judged_top = 0
        self.unknown: set[int] = set()

    def knows(self, token: int) -> bool:
        return token not in self.unknown

    def likeliest(self, seq: int) -> list[Likeliest]:
        found = []
        for place in self.likely or ():
            ranked = sorted(place.items(), key=lambda one: -one[1])[: self.judged_top]
            found.append(Likeliest(int_array([token for token, _ in ranked]), np.array([p for _, p in ranked])))
        return found

    def pass_ms(self, rows: int) -> float:
        return 0.0

    def reading_ms(self, seq: int) -> float:
        return 0.0

    def read(self, seqs: Sequence[int], ms: float) -> None: ...

    def score(self, seq: int) -> tuple[int, int]:
        return 0, 0

    def time_pass(self) -> None: ...


def bucket_names(fusion: Fusion, draft: Draft) -> dict[Path, str]:
    return {
        path: fusion.buckets[bucket].name for path, bucket in zip(paths(draft), draft.buckets.tolist(), strict=True)
    }


def test_tokens_that_the_model_did_not_draft_have_buckets_by_how_likely_it_finds_them() -> None:
    """At the root, and after each token of its chain; what follows a judged token, or the chain, is not judged."""
    likely = [{1: 0.6, 3: 0.25, 4: 0.02}, {2: 0.5, 9: 0.1}]
    retrieved = trie([(3, 7), (5, 8), (1, 9, 6), (4,), (1, 2, 5)])
    fusion = Fusion([Scripted(retrieved, [0.3]), Judging(trie([(1, 2)]), likely, [0.9])])
    assert bucket_names(fusion, fusion.propose(0, 20)) == {
        (1,): "Judging bucket 0, agreed",
        (1, 2): "Judging bucket 0, agreed",
        (1, 2, 5): "Scripted bucket 0",
        (1, 9): "Scripted unlikely, judged 0.05-0.2",
        (1, 9, 6): "Scripted bucket 0",
        (3,): "Scripted unlikely, judged 0.2-1",
        (3, 7): "Scripted bucket 0",
        (4,): "Scripted unlikely, judged 0-0.05",
        (5,): "Scripted unlikely, judged outside of the top 8",
        (5, 8): "Scripted bucket 0",
    }


@pytest.mark.parametrize("top", [None, 1])
def test_what_a_model_cannot_draft_is_neither_judged_nor_dropped(top: int | None) -> None:
    judge = Judging(trie([(1,)]), [{1: 0.9}], [0.9])
    judge.unknown = {3}
    fusion = Fusion([Scripted(trie([(3, 4)]), [0.3]), judge])
    fusion.prune_top_k = top
    names = bucket_names(fusion, fusion.propose(0, 20))
    assert names == {(3,): "Scripted bucket 0", (3, 4): "Scripted bucket 0", (1,): "Judging bucket 0"}


def test_beside_a_runner_up_the_chain_goes_on_after_the_likelier_token() -> None:
    drafted = Draft.of([1, 3, 2], [ROOT, ROOT, 0], [0, 0, 0])
    likely = [{1: 0.6, 3: 0.25}, {2: 0.9}]
    fusion = Fusion([Judging(drafted, likely, [0.9]), Scripted(trie([(1, 4), (3, 4)]), [0.3])])
    names = bucket_names(fusion, fusion.propose(0, 20))
    assert names[1, 4] == "Scripted unlikely, judged outside of the top 8"
    assert names[3, 4] == "Scripted bucket 0" and names[3,].endswith("agreed")


def test_judged_priors_fall_with_the_models_probability() -> None:
    fusion = Fusion([Suffix(), Judging(EMPTY, [], [0.9])])
    by_group: dict[str, list[float]] = {}
    for bucket in fusion.buckets:
        name, _, band = bucket.name.partition(", judged ")
        if band:
            by_group.setdefault(name, []).append(bucket.prior)
    assert by_group.keys() == {"Suffix unlikely", "Suffix likely", "Suffix agreed"}
    for priors in by_group.values():
        assert priors == sorted(priors, reverse=True) and len(set(priors)) == len(BANDS)


def test_nothing_is_judged_where_no_other_proposer_has_drafted() -> None:
    judge = Judging(trie([(1,)]), [{1: 0.9}], [0.9])
    fusion = Fusion([Scripted(EMPTY), judge])
    fusion.propose(0, 20)
    assert judge.judged_top == 0
    Fusion([Scripted(trie([(2,)])), judge]).propose(0, 20)
    assert judge.judged_top == JUDGED_TOP


judgements = st.lists(st.dictionaries(st.integers(0, 3), st.floats(0.0, 1.0), max_size=4), min_size=1, max_size=3)


@given(st.lists(some_paths, min_size=1, max_size=3), st.lists(st.integers(0, 3), max_size=4), judgements)
def test_judging_changes_nothing_but_tokens_beside_those_that_the_model_drafted(
    sources: list[list[Path]], own: list[int], likely: list[dict[int, float]]
) -> None:
    def merged(likely: list[dict[int, float]] | None) -> tuple[Fusion, Draft]:
        fusion = Fusion([*(Scripted(trie(wanted)) for wanted in sources), Judging(trie([tuple(own)]), likely)])
        return fusion, fusion.propose(0, 1000)

    fusion, draft = merged(likely)
    _, without = merged(None)
    assert paths(draft) == paths(without)
    for path, name in bucket_names(fusion, draft).items():
        place = len(path) - 1
        judged = bool(own) and place < len(likely) and path[:-1] == tuple(own[:place])
        assert ("judged" in name) == (judged and path[-1:] != tuple(own[place : place + 1]))
    same = draft.buckets == without.buckets
    assert same.tolist() == ["judged" not in name for name in bucket_names(fusion, draft).values()]


@given(st.lists(some_paths, min_size=1, max_size=3), some_paths, st.integers(0, 20))
def test_without_an_answer_of_the_model_nothing_differs(
    sources: list[list[Path]], own: list[Path], budget: int
) -> None:
    """From a fusion in which no proposer is model-based."""
    parts = [Scripted(trie(wanted), [0.3]) for wanted in sources]
    silent = Fusion([*parts, Judging(trie(own), None, [0.6])])
    silent.prune_top_k = 1
    before = Fusion([*parts, Scripted(trie(own), [0.6])], names=[*["Scripted"] * len(parts), "Judging"])
    assert silent.buckets[: len(before.buckets)] == before.buckets
    assert silent.bucket_source[: len(before.buckets)].tolist() == before.bucket_source.tolist()
    one, two = silent.propose(0, budget), before.propose(0, budget)
    for name in ("tokens", "parents", "buckets"):
        assert getattr(one, name).tolist() == getattr(two, name).tolist()


@given(st.lists(some_paths, min_size=1, max_size=3), some_paths, judgements, st.integers(1, 4))
def test_pruning_drops_exactly_the_paths_whose_first_token_is_not_among_the_likeliest(
    sources: list[list[Path]], own: list[Path], likely: list[dict[int, float]], top: int
) -> None:
    judge = Judging(trie(own), likely)
    fusion = Fusion([*(Scripted(trie(wanted)) for wanted in sources), judge])
    fusion.prune_top_k = top
    judge.judged_top = JUDGED_TOP
    kept = {*judge.likeliest(0)[0].tokens[:top].tolist(), *(path[0] for path in own)}
    wanted = {path[:end] for paths_ in sources for path in paths_ for end in range(1, len(path) + 1)}
    if own:
        wanted = {path for path in wanted if path[0] in kept}
    wanted |= {path[:end] for path in own for end in range(1, len(path) + 1)}
    draft = fusion.propose(0, 1000)
    draft.check(num_buckets=len(fusion.buckets))
    assert set(paths(draft)) == wanted


@given(st.lists(some_paths, min_size=2, max_size=3), some_paths, judgements)
def test_what_only_one_proposer_drafted_has_no_descendants_of_others(
    sources: list[list[Path]], own: list[Path], likely: list[dict[int, float]]
) -> None:
    fusion = Fusion([*(Scripted(trie(wanted)) for wanted in sources), Judging(trie(own), likely)])
    draft = fusion.propose(0, 1000)
    for own_buckets in fusion.own_buckets:
        mine = [bucket in own_buckets for bucket in draft.buckets.tolist()]
        for node, parent in enumerate(draft.parents.tolist()):
            assert parent == ROOT or not mine[parent] or mine[node]


def test_a_model_alone_or_beside_models_judges_nothing() -> None:
    for sources in ([Judging(EMPTY, [])], [Judging(EMPTY, []), Judging(EMPTY, [])]):
        fusion = Fusion(sources)
        assert not any("judged" in bucket.name for bucket in fusion.buckets)
        assert [source.judged_top for source in sources] == [0] * len(sources)
