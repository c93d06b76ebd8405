from collections.abc import Collection, Sequence
from itertools import pairwise

import pytest
from toy_constraint import Toy, by_place, of_target

from specplug.core import NO_OPTIONS, Draft, IntArray, Proposer, SequenceOptions, Step, TokenConstraint, int_array
from specplug.errors import SpecplugError
from specplug.planning.fusion import Fusion
from specplug.proposers.grammar import MOST_STYLES, Grammar
from specplug.testing import ProposerContract, ReplayResult, ToyTarget, replay

ANY = range(100)


class TestContractWithoutConstraint(ProposerContract):
    def make(self) -> Proposer:
        return Grammar()


class Driven(Fusion):
    """A fusion of `grammar` alone, whose sequences all have a constraint, or those that are given."""

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
    before = list(constraint.text)
    draft = grammar.propose(0, budget)
    draft.check(num_buckets=len(grammar.buckets))
    assert draft.parents.tolist() == list(range(-1, len(draft) - 1)), "the draft is a chain"
    assert constraint.text == before, "propose moved the constraint, and not back"
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


class Limited(Toy):
    """Cannot move past the token 9, although it allows it; then it is of no use any more."""

    def advance(self, tokens: Sequence[int]) -> None:
        if 9 in tokens:
            self.following = lambda text: ()
            raise SpecplugError("the constraint is too complex")
        super().advance(tokens)


def test_a_constraint_beyond_its_limits_ends_the_draft_and_no_other_sequence() -> None:
    text = one_of(7, {8, 9}, {9, 8}, 7)
    fusion = Fusion([Grammar()])
    fusion.begin(0, int_array([7, 9, 9, 3]), constraint=Limited(by_place(text).following))
    fusion.begin(1, int_array([7, 9, 9, 3]), constraint=by_place(text))
    assert fusion.propose(0, 8).tokens.tolist() == [7]
    assert fusion.propose(1, 8).tokens.tolist() == [7, 9, 9, 7]
    for seq in (0, 1):
        fusion.observe(seq, Step([7, 9], Draft.of([], [], []), []))
    assert len(fusion.propose(0, 8)) == 0 and 0 not in fusion.constraints
    assert fusion.propose(1, 8).tokens.tolist() == [9, 7]


# -- style -----------------------------------------------------------------------------------------------------------

SPACE, COLON, KEY = 1, 2, 4


def json_like(members: int) -> Toy:
    """Members: a key, a colon, perhaps a space, and a number from 10 on. The style has a space if the last one had."""

    def choices(text: Sequence[int]) -> Collection[int]:
        place = [token for token in text if token != SPACE]
        if len(place) == 3 * members:
            return ()
        if len(place) % 3 == 2:
            return range(10, 20) if text[-1] == SPACE else (SPACE, *range(10, 20))
        return (COLON,) if len(place) % 3 else (KEY,)

    def style(so_far: Sequence[int]) -> TokenConstraint:
        text = list(so_far)
        colons = [place for place, token in enumerate(text[:-1]) if token == COLON]
        spaced = not colons or text[colons[-1] + 1] == SPACE

        def styled(after: Sequence[int]) -> Collection[int]:
            if after and after[-1] == COLON and len(after) > len(text):
                return (SPACE,) if spaced else range(10, 20)
            return choices(after)

        return Toy(styled, text)

    return Toy(choices, style=style)


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


def test_the_style_forces_tokens_where_the_constraint_leaves_a_choice() -> None:
    fusion, _ = begun(json_like(6))
    first = emit(fusion)
    assert first == [(KEY, "forced"), (COLON, "forced"), (SPACE, "forced by style")]
    assert emit(fusion, KEY, COLON, SPACE, 12)[:3] == first, "still in this style"


def test_a_text_that_leaves_the_style_gets_another_one_after_some_tokens() -> None:
    fusion, _ = begun(json_like(9))
    emit(fusion, KEY, COLON, SPACE, 12)
    left = emit(fusion, KEY, COLON, 13)  # 7 tokens with those before
    assert left[:2] == [(KEY, "forced"), (COLON, "forced")] and "forced by style" not in {name for _, name in left}
    assert (SPACE, "forced by style") not in emit(fusion, KEY, COLON, 14), "the other style has no space"
    assert emit(fusion, KEY, COLON, SPACE)[:1] != [(SPACE, "forced by style")]
    emit(fusion, 15, KEY, COLON, SPACE, 16)
    assert (SPACE, "forced by style") in emit(fusion, KEY, COLON, SPACE, 17), "and back again"


def test_a_text_that_leaves_every_style_gets_few() -> None:
    asked: list[int] = []
    following = json_like(201).following

    def style(text: Sequence[int]) -> TokenConstraint:
        asked.append(len(text))
        return Toy(lambda after: (), text)  # the text leaves it with the next token

    fusion, _ = begun(Toy(following, style=style))
    for _ in range(200):
        fusion.observe(0, Step([KEY, COLON, SPACE, 12], Draft.of([], [], []), []))
    assert len(asked) == MOST_STYLES
    waits = [late - early for early, late in pairwise(asked)]
    assert waits == [8, 8, 16, 32, 64, 128, 256]


def test_a_match_of_two_tokens_comes_before_the_style_and_does_not_end_it() -> None:
    """Behind 15, a key and a colon the prompt has no space, but the style has one: it is left in the draft only."""
    fusion, grammar = begun(json_like(8), [99, SPACE, 15, KEY, COLON, 15, 98])
    emit(fusion, KEY, COLON, SPACE)
    drafts = [emit(fusion) for _ in range(3)]
    assert drafts[0] == drafts[1] == drafts[2]
    assert drafts[0][:4] == [(15, "looked up 1"), (KEY, "forced"), (COLON, "forced"), (15, "looked up 4")]
    (run,) = grammar._running.values()
    assert run is not None and isinstance(run.style, Toy) and run.style.text == [KEY, COLON, SPACE]


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
