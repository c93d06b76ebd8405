"""The rules are lossless, by exact enumeration of all random draws with their probabilities as fractions."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import lcm

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specplug.core import EMPTY, ROOT, Draft
from specplug.verification.reference import verify_chain_by_rejection, verify_tree

VOCAB = 3
Path = tuple[int, ...]
Choose = Callable[[Sequence[int]], int]
"""Draws an index with the given weights."""

Model = Callable[[Path], tuple[int, ...]]
"""Returns the weights of the next token after a path; their sum is never 0."""


class Draws:
    """Draws the indices of `fixed`, then always the first possible one; the alternatives are added to `pending`."""

    def __init__(self, fixed: list[int], pending: list[list[int]]) -> None:
        self.fixed = fixed
        self.pending = pending
        self.made: list[int] = []
        self.chance = Fraction(1)

    def choose(self, weights: Sequence[int]) -> int:
        if len(self.made) < len(self.fixed):
            pick = self.fixed[len(self.made)]
        else:
            pick, *others = [i for i, weight in enumerate(weights) if weight]
            self.pending += [[*self.made, other] for other in others]
        self.made.append(pick)
        self.chance *= Fraction(weights[pick], sum(weights))
        return pick


def outcomes(run: Callable[[Choose], Path]) -> dict[Path, Fraction]:
    """The exact distribution of what `run` returns when its draws are independent."""
    found: defaultdict[Path, Fraction] = defaultdict(Fraction)
    pending: list[list[int]] = [[]]
    while pending:
        draws = Draws(pending.pop(), pending)
        found[run(draws.choose)] += draws.chance
    assert sum(found.values()) == 1
    return dict(found)


def sampled(model: Model, length: int) -> dict[Path, Fraction]:
    """The target's own distribution over the next `length` tokens."""
    found: dict[Path, Fraction] = {(): Fraction(1)}
    for _ in range(length):
        found = {
            (*path, token): chance * Fraction(weight, sum(model(path)))
            for path, chance in found.items()
            for token, weight in enumerate(model(path))
            if weight
        }
    return found


def paths(draft: Draft) -> dict[int, Path]:
    """The tokens from the root to each node."""
    found: dict[int, Path] = {ROOT: ()}
    for node, (token, parent) in enumerate(zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True)):
        found[node] = (*found[parent], token)
    return found


@st.composite
def models(draw: st.DrawFn, total: int | None = None) -> Model:
    """A model whose distributions differ from path to path; some weights are 0."""
    weights = st.tuples(*[st.integers(0, 4)] * VOCAB).filter(any)
    if total is not None:
        weights = st.tuples(st.integers(0, total), st.integers(0, total)).map(
            lambda cuts: (min(cuts), max(cuts) - min(cuts), total - max(cuts))
        )
    lines = draw(st.lists(weights, min_size=5, max_size=5))
    return lambda path: lines[sum((token + 1) * 7**i for i, token in enumerate(path)) % len(lines)]


@st.composite
def drafts(draw: st.DrawFn, max_nodes: int = 7) -> Draft:
    places: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(0, max_nodes))):
        place = draw(st.integers(ROOT, len(places) - 1)), draw(st.integers(0, VOCAB - 1))
        if place not in places:
            places.append(place)
    return Draft.of([token for _, token in places], [parent for parent, _ in places], [0] * len(places))


# -- trees -----------------------------------------------------------------------------------------------------------


def speculate(first: Draft, second: Draft, model: Model, length: int, choose: Choose) -> Path:
    """The first `length` tokens of steps that verify `first`, then `second`, then empty drafts."""
    text: Path = ()
    following = iter([first, second])
    while len(text) < length:
        draft = next(following, EMPTY)
        at = paths(draft)
        emitted, _ = verify_tree(draft, lambda node, text=text, at=at: choose(model((*text, *at[node]))))
        text += tuple(emitted)
    return text[:length]


@settings(max_examples=50)
@given(drafts(), drafts(max_nodes=3), models(), st.integers(1, 2))
def test_tokens_are_distributed_as_the_targets(first: Draft, second: Draft, model: Model, length: int) -> None:
    assert outcomes(lambda choose: speculate(first, second, model, length, choose)) == sampled(model, length)


@given(drafts(), models())
def test_a_step_accepts_with_the_probability_of_the_children(draft: Draft, model: Model) -> None:
    at = paths(draft)
    accepted = outcomes(lambda choose: tuple(verify_tree(draft, lambda node: choose(model(at[node])))[1]))
    reached: defaultdict[int, Fraction] = defaultdict(Fraction, {ROOT: Fraction(1)})
    for nodes, chance in accepted.items():
        for node in nodes:
            reached[node] += chance
    for node, path in at.items():
        children = [child for child, parent in enumerate(draft.parents.tolist()) if parent == node]
        weights = model(path)
        share = Fraction(sum(weights[int(draft.tokens[child])] for child in children), sum(weights))
        assert sum(reached[child] for child in children) == reached[node] * share


@given(drafts(), models())
def test_a_step_is_its_accepted_path_and_one_token(draft: Draft, model: Model) -> None:
    at = paths(draft)

    def run(choose: Choose) -> Path:
        asked: list[int] = []

        def pick(node: int) -> int:
            asked.append(node)
            return choose(model(at[node]))

        emitted, accepted = verify_tree(draft, pick)
        assert asked == [ROOT, *accepted]
        last = accepted[-1] if accepted else ROOT
        assert tuple(emitted[:-1]) == at[last]
        assert (*at[last], emitted[-1]) not in at.values()
        return tuple(emitted)

    outcomes(run)


@given(drafts(), models())
def test_greedy_text_is_plain_greedy_text(draft: Draft, model: Model) -> None:
    def best(path: Path) -> int:
        return int(np.argmax(model(path)))

    at = paths(draft)
    emitted, accepted = verify_tree(draft, lambda node: best(at[node]))
    text: list[int] = []
    for _ in emitted:
        text.append(best(tuple(text)))
    assert emitted == text
    # The tree contains no more of the text: no node has the next token.
    assert len(accepted) == max(len(path) for path in at.values() if list(path) == best_text(model, len(path)))


def best_text(model: Model, length: int) -> list[int]:
    text: list[int] = []
    for _ in range(length):
        text.append(int(np.argmax(model(tuple(text)))))
    return text


def test_a_walk_by_hand() -> None:
    """1 and 2 are children of the root, 5 and 6 of 2; the target emits 2, 6, 6."""
    draft = Draft.of([1, 2, 5, 6], [ROOT, ROOT, 1, 1], [0] * 4)
    target = iter([2, 6, 6])
    assert verify_tree(draft, lambda _: next(target)) == ([2, 6, 6], [1, 3])
    assert verify_tree(draft, lambda _: 6) == ([6], [])
    assert verify_tree(EMPTY, lambda _: 4) == ([4], [])


# -- chains with rejection -------------------------------------------------------------------------------------------

TOTAL = 4
GRID = lcm(*range(1, TOTAL + 1))
"""Probabilities are quarters, so that every threshold of the rule is a multiple of 1 / GRID. Any random number from
[0, 1) then has the effect of the middle of its grid cell."""


def probabilities(model: Model, path: Path) -> list[float]:
    return [weight / TOTAL for weight in model(path)]


def uniform(choose: Choose) -> float:
    return (choose([1] * GRID) + 0.5) / GRID


def speculate_by_rejection(drafter: Model, target: Model, drafted: int, length: int, choose: Choose) -> Path:
    """The first `length` tokens of a step whose draft the drafter samples, then of plain decoding."""
    tokens: Path = ()
    for _ in range(drafted):
        tokens += (choose(drafter(tokens)),)
    emitted = verify_chain_by_rejection(
        tokens,
        np.array([probabilities(drafter, tokens[:i]) for i in range(drafted)]).reshape(-1, VOCAB),
        np.array([probabilities(target, tokens[:i]) for i in range(drafted + 1)]),
        lambda: uniform(choose),
    )
    assert 1 <= len(emitted) <= drafted + 1
    assert tuple(emitted[:-1]) == tokens[: len(emitted) - 1]
    text = tuple(emitted[:length])
    while len(text) < length:
        text += (choose(target(text)),)
    return text


@settings(max_examples=25)
@given(models(total=TOTAL), models(total=TOTAL), st.integers(0, 2), st.integers(1, 3))
def test_rejection_emits_the_targets_tokens(drafter: Model, target: Model, drafted: int, length: int) -> None:
    found = outcomes(lambda choose: speculate_by_rejection(drafter, target, drafted, length, choose))
    assert found == sampled(target, length)


@settings(max_examples=30)
@given(models(total=TOTAL), models(total=TOTAL))
def test_rejection_accepts_with_the_overlap_of_both_distributions(drafter: Model, target: Model) -> None:
    """The overlap is the sum over tokens of the smaller of the two probabilities."""
    q, p = drafter(()), target(())

    def run(choose: Choose) -> Path:
        token = choose(q)
        line = [probabilities(target, ()), probabilities(target, (token,))]
        emitted = verify_chain_by_rejection(
            [token], np.array([probabilities(drafter, ())]), np.array(line), lambda: uniform(choose)
        )
        return (len(emitted) - 1,)

    agreed = Fraction(sum(min(a, b) for a, b in zip(p, q, strict=True)), TOTAL)
    assert outcomes(run).get((1,), Fraction(0)) == agreed
