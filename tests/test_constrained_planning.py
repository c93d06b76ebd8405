"""Fusion and speculator with sequences that have a constraint, beside others that have none."""

from collections.abc import Callable, Mapping, Sequence
from itertools import count

import pytest
from toy_constraint import Toy, by_place, of_target

from specplug.core import ROOT, Bucket, Draft, IntArray, Proposer, Requires, Step, TokenConstraint, int_array
from specplug.planning.cost import CostCurve
from specplug.planning.fusion import Fusion
from specplug.planning.speculator import Speculator
from specplug.profile import PlannerSettings, Profile
from specplug.proposers.grammar import Grammar
from specplug.proposers.ngram import Ngram
from specplug.proposers.suffix import Suffix
from specplug.proposers.token_recycling import TokenRecycling
from specplug.testing import ToyTarget, verify_known

FREE = [50.0] * 64
"""Milliseconds: any number of rows takes as long as one."""


class Fixed:
    """Drafts the same tree every time, as far as the budget goes."""

    def __init__(self, draft: Draft, prior: float = 0.9) -> None:
        self.draft = draft
        self.requires = Requires()
        self.buckets = (Bucket("fixed", prior),)

    def begin(self, seq: int, prompt: IntArray) -> None:
        pass

    def propose(self, seq: int, budget: int) -> Draft:
        return self.draft.select(range(min(budget, len(self.draft))))

    def observe(self, seq: int, step: Step) -> None:
        pass

    def end(self, seq: int) -> None:
        pass


class Counting(Grammar):
    """Counts how often it is asked, by sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def propose(self, seq: int, budget: int) -> Draft:
        self.asked.append(seq)
        return super().propose(seq, budget)


def with_constraint(fusion: Fusion, constraint: TokenConstraint, prompt: Sequence[int] = (90, 91)) -> Fusion:
    fusion.begin(0, int_array(prompt), constraint=constraint)
    return fusion


# -- fusion ----------------------------------------------------------------------------------------------------------


def test_the_draft_of_any_proposer_is_cut_before_the_budget_is_applied() -> None:
    """Of 8, 9 and 1 only 1 is allowed, and 2 after it: both fit into a budget of two, although they come last."""
    tree = Draft.of([8, 9, 1, 2, 3], [ROOT, ROOT, ROOT, 2, 3], [0] * 5)
    fusion = with_constraint(Fusion([Fixed(tree), Ngram()]), by_place([{1}, {2, 4}, {4, 5}]))
    assert fusion.propose(0, 8).tokens.tolist() == [1, 2]
    found = [[(0, tree), (1, Draft.of([7], [ROOT], [0]))]]
    assert fusion.merge([0], found, [2])[0].tokens.tolist() == [1, 2]


def test_a_forced_token_keeps_its_bucket_whoever_agrees() -> None:
    for sources in ([Fixed(Draft.chain([1, 2], [0, 0])), Grammar()], [Grammar(), Fixed(Draft.chain([1, 2], [0, 0]))]):
        fusion = with_constraint(Fusion(sources), by_place([{1}, {2}, {3}, {4, 5}]))
        draft = fusion.propose(0, 8)
        assert draft.tokens.tolist() == [1, 2, 3]
        assert {fusion.buckets[bucket].name for bucket in draft.buckets.tolist()} == {"Grammar forced"}


@pytest.mark.parametrize("others", [[Suffix], [Suffix, TokenRecycling]])
def test_without_a_constraint_nothing_differs_from_a_fusion_without_grammar(
    others: list[Callable[[], Proposer]],
) -> None:
    alone, beside = Fusion([make() for make in others]), Fusion([*(make() for make in others), Grammar()])
    assert beside.buckets[: len(alone.buckets)] == alone.buckets
    prompt = int_array([5, 6, 7, 8, 5, 6, 9, 1, 5, 6])
    for fusion in (alone, beside):
        fusion.begin(0, prompt)
    one, two = alone.propose(0, 16), beside.propose(0, 16)
    assert len(one) and one.tokens.tolist() == two.tokens.tolist() and one.buckets.tolist() == two.buckets.tolist()


def test_a_constraint_ends_where_another_token_was_emitted() -> None:
    """Such as the token that stands for a sequence that has failed: then its drafts are no longer cut."""
    fusion = with_constraint(Fusion([Fixed(Draft.chain([7, 7], [0, 0])), Grammar()]), by_place([{1}, {2}, {3}]))
    assert fusion.propose(0, 8).tokens.tolist() == [1, 2, 3]
    fusion.observe(0, Step([9], Draft.of([], [], []), []))
    assert fusion.propose(0, 8).tokens.tolist() == [7, 7] and not fusion.constraints
    fusion.end(0)


# -- speculator ------------------------------------------------------------------------------------------------------


def speculator(sources: Sequence[Proposer], **planner: object) -> Speculator:
    curve = CostCurve([0], range(1, len(FREE) + 1), [FREE])
    settings = PlannerSettings(**planner)  # type: ignore[arg-type]
    fusion = Fusion(sources, clock=count(step=20_000).__next__)
    return Speculator(fusion, curve, Profile("toy", planner=settings))


def generate(
    one: Speculator,
    prompts: Mapping[int, Sequence[int]],
    texts: Mapping[int, Sequence[int]],
    constraints: Mapping[int, Toy],
    target: ToyTarget,
) -> tuple[dict[int, list[int]], list[dict[int, Draft]]]:
    """The emitted texts, and the drafts of each step by sequence."""
    for seq, prompt in prompts.items():
        one.begin(seq, int_array(prompt), constraint=constraints.get(seq))
    emitted: dict[int, list[int]] = {seq: [] for seq in texts}
    history: list[dict[int, Draft]] = []
    running = list(texts)
    while running:
        budgets = [len(texts[seq]) - len(emitted[seq]) - 1 for seq in running]
        drafts = one.plan(running, 100, budgets)
        history.append(dict(zip(running, drafts, strict=True)))
        steps = []
        for seq, draft in zip(running, drafts, strict=True):
            wanted, context = one.wants_topk, [*prompts[seq], *emitted[seq]]
            topk = (lambda tokens, k=wanted: target.topk(tokens, k)) if wanted else None
            steps.append(verify_known(draft, texts[seq][len(emitted[seq]) :], context, topk))
        one.observe(running, steps, target_ms=50.0)
        for seq, step in zip(running, steps, strict=True):
            emitted[seq] += step.emitted
        for seq in [seq for seq in running if len(emitted[seq]) == len(texts[seq])]:
            running.remove(seq)
            one.end(seq)
    return emitted, history


@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize("mode", ["measured", "static"])
def test_a_batch_with_some_constrained_sequences(trees: bool, mode: str) -> None:
    target = ToyTarget(64, seed=5)
    prompts = {seq: target.prompt(16, key=seq).tolist() for seq in range(4)}
    texts = {seq: target.greedy(prompt, 80) for seq, prompt in prompts.items()}
    constraints = {seq: of_target(target, prompts[seq]) for seq in (1,)}
    grammar = Counting()
    one = speculator([Suffix(), TokenRecycling(), grammar], trees=trees, mode=mode)
    emitted, history = generate(one, prompts, texts, constraints, target)
    assert emitted == texts
    assert set(grammar.asked) == {1}
    assert not one.fusion.constraints, "a constraint ends with its sequence"
    context = list(prompts[1])
    checked = 0
    for drafts in history:
        if (draft := drafts.get(1)) is None:
            break
        checked += len(draft)
        constraint = of_target(target, context)
        for node in range(len(draft)):
            path, at = [], node
            while at != ROOT:
                path.append(int(draft.tokens[at]))
                at = int(draft.parents[at])
            assert constraint.allowed(path[::-1]) == len(path), "a forbidden token took a row"
        context += verify_known(draft, texts[1][len(context) - 16 :]).emitted
    assert checked > 20


@pytest.mark.parametrize("mode", ["measured", "static"])
def test_without_a_constraint_grammar_is_never_asked(mode: str) -> None:
    target, grammar = ToyTarget(64, seed=5), Counting()
    prompt = target.prompt(16).tolist()
    text = target.greedy(prompt, 40)
    for sources in ([grammar], [Suffix(), grammar]):
        one = speculator(sources, mode=mode)
        assert generate(one, {0: prompt}, {0: text}, {}, target)[0] == {0: text}
    assert grammar.asked == []


def test_what_was_cut_counts_neither_as_accepted_nor_as_rejected() -> None:
    """The proposer drafts 8, which is forbidden, and 1, which is emitted: only 1 is counted."""
    tree = Draft.of([8, 1], [ROOT, ROOT], [0, 0])
    one = speculator([Fixed(tree, prior=0.5)])
    one.begin(0, int_array([90, 91]), constraint=by_place([{1, 2}] * 5))
    before = one.table.hits[0], one.table.misses[0]
    (draft,) = one.plan([0], 10, [8])
    assert draft.tokens.tolist() == [1]
    one.observe([0], [verify_known(draft, [1, 2])], target_ms=50.0)
    decay = 0.99
    assert one.table.hits[0] == pytest.approx(before[0] * decay + 1)
    assert one.table.misses[0] == pytest.approx(before[1] * decay), "8 is no miss"


def test_steps_in_which_nobody_was_asked_move_the_constraint_before_the_next_draft() -> None:
    target, grammar = ToyTarget(64, seed=5), Counting()
    one = speculator([grammar])
    prompt = target.prompt(16).tolist()
    text = target.greedy(prompt, 30)
    constraint = of_target(target, prompt)
    one.begin(0, int_array(prompt), constraint=constraint)
    one.selection.back_offs[0].cooldown = 3
    emitted: list[int] = []
    for _ in range(3):
        (draft,) = one.plan([0], 100, [20])
        assert not len(draft)
        one.observe([0], [verify_known(draft, text[len(emitted) :])], target_ms=50.0)
        emitted.append(text[len(emitted)])
    assert constraint.text == prompt, "nobody needs it"
    one.plan([0], 100, [20])
    assert grammar.asked == [0] and constraint.text == [*prompt, *emitted]
