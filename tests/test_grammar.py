from collections.abc import Collection, Sequence

import pytest
from toy_constraint import Toy, by_place, of_target

from specplug.core import NO_OPTIONS, Draft, IntArray, Proposer, SequenceOptions, Step, TokenConstraint, int_array
from specplug.planning.fusion import Fusion
from specplug.proposers.grammar import Grammar
from specplug.testing import ProposerContract, ReplayResult, ToyTarget, replay

ANY = range(100)


class TestContractWithoutConstraint(ProposerContract):
    def make(self) -> Proposer:
        return Grammar()


class Driven(Fusion):
    """A fusion of `grammar` alone, whose sequences all have a constraint, or as told."""

    def __init__(self, constraint: TokenConstraint | None = None) -> None:
        super().__init__([Grammar()])
        self._constraint = constraint

    def begin(
        self,
        seq: int,
        prompt: IntArray,
        options: SequenceOptions = NO_OPTIONS,
        constraint: TokenConstraint | None = None,
    ) -> None:
        super().begin(seq, prompt, options, self._constraint or of_target(TARGET, prompt.tolist()))

    def propose(self, seq: int, budget: int) -> Draft:
        if seq not in self.constraints:  # then the fusion asks nobody
            return self.sources[0].propose(seq, 0)
        return super().propose(seq, budget)


TARGET = ToyTarget(64, seed=7)


class TestContractWithConstraint(ProposerContract):
    def make(self) -> Proposer:
        return Driven()

    def target(self) -> ToyTarget:
        return TARGET


def drafted(constraint: Toy, prompt: Sequence[int], budget: int = 32, **options: int) -> tuple[list[int], list[str]]:
    """The draft at the start of a sequence, and the names of its buckets."""
    grammar = Grammar(**options)
    grammar.use_constraint(0, constraint)
    grammar.begin(0, int_array(prompt))
    before = list(constraint.text), [list(style.text) for style in constraint.styles() if isinstance(style, Toy)]
    draft = grammar.propose(0, budget)
    draft.check(num_buckets=len(grammar.buckets))
    assert draft.parents.tolist() == list(range(-1, len(draft) - 1)), "the draft is a chain"
    after = list(constraint.text), [list(style.text) for style in constraint.styles() if isinstance(style, Toy)]
    assert after == before, "propose moved the constraint or a style, and not back"
    return draft.tokens.tolist(), [grammar.buckets[bucket].name for bucket in draft.buckets.tolist()]


def one_of(*choices: int | Collection[int]) -> list[Collection[int]]:
    return [(one,) if isinstance(one, int) else one for one in choices]


def test_forced_tokens_are_drafted_up_to_the_first_choice() -> None:
    assert drafted(by_place(one_of(7, 8, 9, ANY, 7)), [1, 2]) == ([7, 8, 9], ["forced"] * 3)


def test_forced_and_looked_up_tokens_take_turns() -> None:
    """The text has 7 8 40 41 10: after the forced 7 8, the tokens 40 41 are looked up, and 9 10 11 are forced again.

    The match is 7 8, and one token longer for the second looked-up one.
    """
    constraint = by_place(one_of(7, 8, ANY, ANY, 9, 10, 11))
    tokens, why = drafted(constraint, [7, 8, 40, 41, 10, 1, 2])
    assert tokens == [7, 8, 40, 41, 9, 10, 11]
    assert why == [*["forced"] * 2, "looked up 2", "looked up 3", *["forced"] * 3]


def test_a_looked_up_token_that_is_forbidden_ends_the_chain() -> None:
    constraint = by_place(one_of(7, ANY, {50, 51}, 9))
    assert drafted(constraint, [7, 40, 41, 1, 2])[0] == [7, 40]


def test_an_older_occurrence_is_taken_where_the_most_recent_one_is_forbidden() -> None:
    constraint = by_place(one_of(7, {50, 51}, 9))
    assert drafted(constraint, [7, 50, 1, 7, 40, 1, 2])[0] == [7, 50, 9]


def test_the_budget_the_longest_draft_and_the_least_probability_end_a_chain() -> None:
    constraint = by_place(one_of(*[7] * 40))
    assert len(drafted(constraint, [1, 2], budget=5)[0]) == 5
    assert len(drafted(constraint, [1, 2], max_draft=9)[0]) == 9
    assert drafted(constraint, [1, 2], budget=0)[0] == []
    # A single equal token predicts little: 0.23, then 0.23 times 0.52 for a match of two.
    free = by_place([ANY] * 40)
    assert len(drafted(free, [7, 40, 41, 42, 43, 7], min_prob=0.2)[0]) == 1
    assert len(drafted(free, [7, 40, 41, 42, 43, 7], min_prob=0.1)[0]) == 2


# -- styles ----------------------------------------------------------------------------------------------------------

SPACE, COLON, QUOTE, KEY = 1, 2, 3, 4


def json_like(members: int) -> Toy:
    """Members of a key, a colon, perhaps a space, and a number from 10 on."""

    def choices(text: Sequence[int]) -> Collection[int]:
        place = [token for token in text if token != SPACE]
        if len(place) == 3 * members:
            return ()
        if len(place) % 3 == 2:
            return range(10, 20) if text[-1] == SPACE else (SPACE, *range(10, 20))
        return (COLON,) if len(place) % 3 else (KEY,)

    def spaced(text: Sequence[int]) -> Collection[int]:
        return (SPACE,) if text and text[-1] == COLON else choices(text)

    def compact(text: Sequence[int]) -> Collection[int]:
        return [token for token in choices(text) if token != SPACE]

    return Toy(choices, styles=[Toy(spaced), Toy(compact)])


def begun(constraint: Toy, prompt: Sequence[int] = (99, 98)) -> tuple[Fusion, Grammar]:
    grammar = Grammar()
    fusion = Fusion([grammar])
    fusion.begin(0, int_array(prompt), constraint=constraint)
    return fusion, grammar


def emit(fusion: Fusion, *tokens: int) -> list[tuple[int, str]]:
    """What is drafted after these tokens were emitted."""
    if tokens:
        fusion.observe(0, Step(list(tokens), Draft.of([], [], []), []))
    draft = fusion.propose(0, 32)
    return [
        (token, fusion.buckets[bucket].name)
        for token, bucket in zip(draft.tokens.tolist(), draft.buckets.tolist(), strict=True)
    ]


def test_a_style_forces_tokens_while_it_agrees_with_the_text() -> None:
    fusion, _ = begun(json_like(6))
    first = emit(fusion)
    assert first == [(KEY, "forced"), (COLON, "forced"), (SPACE, "forced by style")]
    assert emit(fusion, KEY, COLON, SPACE, 12)[:3] == first, "still in this style"
    # Without the space, this style is at an end; the other one was at the first space.
    left = emit(fusion, KEY, COLON, 13)
    assert left[:2] == first[:2] and "forced by style" not in {name for _, name in left}


def test_the_second_style_is_followed_where_the_first_one_has_ended() -> None:
    fusion, _ = begun(json_like(6), [99, KEY, COLON, 15, 98])
    assert (SPACE, "forced by style") in emit(fusion)
    after = emit(fusion, KEY, COLON, 12)
    assert SPACE not in {token for token, _ in after}
    # The most recent colon with a key before it was followed by 12.
    assert after[2] == (12, "looked up 2")


def test_a_draft_that_leaves_a_style_does_not_end_it() -> None:
    """Each draft leaves one of the two styles at its first space; the text has not."""
    fusion, grammar = begun(json_like(4))
    drafts = [emit(fusion) for _ in range(3)]
    assert drafts[0] == drafts[1] == drafts[2] and (SPACE, "forced by style") in drafts[0]
    assert [len(run.styles) for run in grammar._running.values() if run is not None] == [2]
    emit(fusion, KEY, COLON, SPACE)
    assert [len(run.styles) for run in grammar._running.values() if run is not None] == [1]


# -- acceptance ------------------------------------------------------------------------------------------------------


def run_target(branches: int, tokens: int = 120) -> tuple[Driven, ReplayResult]:
    target = ToyTarget(64, seed=3, branches=branches)
    prompt = target.prompt(24).tolist()
    driven = Driven(of_target(target, prompt))
    return driven, replay(driven, prompt, target.greedy(prompt, tokens), 16)


@pytest.mark.parametrize("branches", [2, 3])
def test_every_forced_token_is_accepted_and_no_draft_is_forbidden(branches: int) -> None:
    driven, result = run_target(branches)
    verified, accepted = result.bucket_counts(len(driven.buckets))[0]
    assert verified == accepted >= 40


def test_drafts_go_on_behind_a_choice() -> None:
    """About half of the tokens are forced; with lookups between them, a pass emits more than a forced run does."""
    _, result = run_target(2)
    assert result.mean_acceptance_length >= 2.5


@pytest.mark.parametrize("options", [{"max_draft": 0}, {"min_prob": 1.5}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Grammar(**options)  # type: ignore[arg-type]
