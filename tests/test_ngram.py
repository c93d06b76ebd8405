import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.core import Draft, Proposer, int_array
from specplug.proposers.ngram import Ngram
from specplug.testing import ProposerContract, replay


class TestContract(ProposerContract):
    def make(self) -> Proposer:
        return Ngram()


def propose(proposer: Ngram, prompt: list[int], budget: int = 10) -> tuple[list[int], list[str]]:
    proposer.begin(0, int_array(prompt))
    draft = proposer.propose(0, budget)
    assert draft.parents.tolist() == list(range(-1, len(draft) - 1))
    return draft.tokens.tolist(), names(proposer, draft)


def names(proposer: Ngram, draft: Draft) -> list[str]:
    return [proposer.buckets[bucket].name for bucket in draft.buckets.tolist()]


def test_worked_example() -> None:
    # The last three tokens also occur at the start, before 4. The match has length 3, and one more with every draft
    # token; the buckets are 3, 4, 5 and 6-7.
    tokens, why = propose(Ngram(max_match=3, max_draft=4), [1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert tokens == [4, 5, 6, 1]
    assert why == ["match 3", "match 4", "match 5", "match 6"]


def test_the_longest_match_is_preferred_to_a_more_recent_shorter_one() -> None:
    assert propose(Ngram(max_draft=1), [1, 2, 9, 5, 2, 8, 1, 2])[0] == [9]


def test_of_equal_matches_the_most_recent_is_taken() -> None:
    assert propose(Ngram(max_draft=1), [1, 2, 9, 1, 2, 8, 7, 1, 2])[0] == [8]


def test_matches_shorter_than_min_match_are_ignored() -> None:
    assert propose(Ngram(min_match=1), [2, 9, 1, 2])[0][:1] == [9]
    assert propose(Ngram(min_match=2), [2, 9, 1, 2]) == ([], [])


def test_a_loop_is_drafted_as_a_loop() -> None:
    assert propose(Ngram(max_draft=5), [7, 1, 2, 1, 2])[0] == [1, 2, 1, 2, 1]


def test_a_match_is_measured_beyond_max_match() -> None:
    text = list(range(100, 120))
    _, why = propose(Ngram(max_match=2, max_draft=2), [*text, 5, *text])
    assert why == ["match 16", "match 16"]


def test_copying_distinct_words_takes_the_calculated_number_of_steps() -> None:
    # The first token has no match: 1 step. Then a step emits 10 draft tokens and the target's own: 59 / 11, rounded up.
    words = list(range(60))
    result = replay(Ngram(max_draft=10), [*words, 99], words, budget=16)
    assert len(result.steps) == 1 + 6


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 3), st.integers(0, 3))
def test_the_match_is_that_of_a_complete_search(tokens: list[int], min_match: int, more: int) -> None:
    max_match = min_match + more
    expected: list[int] = []
    for n in range(max_match, min_match - 1, -1):
        ends = [end for end in range(n, len(tokens)) if tokens[end - n : end] == tokens[len(tokens) - n :]]
        if ends and n <= len(tokens):
            expected = [tokens[ends[-1]]]
            break
    assert propose(Ngram(max_match=max_match, min_match=min_match), tokens, budget=1)[0] == expected


@pytest.mark.parametrize("options", [{"max_match": 0}, {"max_match": 3, "min_match": 4}, {"max_draft": 0}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Ngram(**options)
