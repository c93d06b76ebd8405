"""The lookup rules of llama-server and vLLM, on texts that were worked out by hand; and replays with them."""

import pytest

from specplug.tune.server_flags.answer_replay import UNKNOWN, RecordedAnswer, Replayed, replayed, total
from specplug.tune.server_flags.drafter_guesses import AnswerGuesses, RecordedDrafter
from specplug.tune.server_flags.lookup_rules import Chain, LookupRule, NgramSimple, VllmNgram
from specplug.tune.server_flags.ngram_cache_rule import NgramCache
from specplug.tune.server_flags.ngram_map_rule import NgramMap
from specplug.tune.server_flags.ngram_mod_rule import NgramMod


def drafted(rule: LookupRule, text: list[int], prompt: int | None = None) -> list[int]:
    """What is drafted after the last token of a text, of which `prompt` tokens are the prompt."""
    rule.begin(text, len(text) - 1 if prompt is None else prompt)
    return rule.draft(text, len(text) - 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([9, 1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),
        ([9, 1, 2, 3, 8, 1, 2, 4, 1, 2], [4, 1]),  # the newest occurrence, and nothing after the token before the last
        ([9, 1, 2, 3, 4, 1, 2], []),  # no text of at most n + m + 1 tokens before the last one
        ([1, 2, 3, 4, 5, 6, 7, 1, 2], []),  # an occurrence at the very first token does not count
        ([9, 8, 7, 6, 5, 1, 2, 1, 2], []),  # fewer than n tokens follow
        ([9, 8, 7, 6, 5, 4, 3, 1, 2], []),
    ],
)
def test_ngram_simple_drafts_what_followed_the_newest_occurrence(text: list[int], expected: list[int]) -> None:
    assert drafted(NgramSimple(2, 3), text) == expected


def test_ngram_simple_finds_what_became_known_since_its_last_draft() -> None:
    text = [9, 1, 2, 3, 4, 5, 6, 7, 5, 6, 8]
    rule = NgramSimple(2, 2)
    rule.begin(text, 7)
    assert rule.draft(text, 7) == [], "7 is new"
    assert rule.draft(text, 8) == [], "7, 5 is new"
    assert rule.draft(text, 9) == [7, 5], "5, 6 stands at place 5"
    rule.begin([9, 9, 5, 6, 1, 1, 1, 5, 6], 8)
    assert rule.draft([9, 9, 5, 6, 1, 1, 1, 5, 6], 8) == [1, 1], "another text has other places"


@pytest.mark.parametrize(
    ("text", "context", "expected"),
    [
        ([1, 2, 3, 9, 2, 3, 8, 2, 3], None, [9, 2, 3]),  # of two occurrences the earliest
        ([1, 2, 3, 4, 5, 2, 3, 6, 1, 2, 3], None, [4, 5, 2]),  # the longest end first: 1, 2, 3
        ([7, 7, 7], None, [7]),  # an occurrence may overlap with the end
        ([1, 2, 3], None, []),
        ([1, 2, 3, 9, 2, 3, 8, 2, 3], 11, [9, 2]),  # two tokens up to the limit of the context
        ([1, 2, 3, 9, 2, 3, 8, 2, 3], 9, []),
    ],
)
def test_vllms_ngram_drafts_what_followed_the_earliest_longest_occurrence(
    text: list[int], context: int | None, expected: list[int]
) -> None:
    assert drafted(VllmNgram(3, 1, 3, context), text) == expected


def test_vllms_ngram_ignores_ends_that_are_too_short() -> None:
    assert drafted(VllmNgram(3, 2, 3), [1, 5, 9, 8, 5]) == []


def test_ngram_map_k_drafts_no_more_than_was_accepted_the_last_time() -> None:
    text = [9, 1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 1, 2, 8, 1, 2]
    rule = NgramMap(2, 2, key_only=True)
    rule.begin(text, 7)
    assert rule.draft(text, 7) == []
    assert rule.draft(text, 8) == [3, 4]
    rule.accepted(1)
    assert rule.draft(text, 12) == [3]
    rule.accepted(0)
    assert rule.draft(text, 15) == []


def test_ngram_map_forgets_what_stood_in_the_answer_before() -> None:
    text = [9, 1, 2, 3, 4, 5, 6, 7, 8, 6, 0, 10, 11]
    rule = NgramMap(1, 1, key_only=True)
    rule.begin(text, 5)
    assert [rule.draft(text, length) for length in (5, 6, 7, 8, 9)] == [[], [], [], [], [7]]
    rule.accepted(0)
    rule.draft(text, 12)
    other = [9, 1, 2, 3, 4, 5, 6, 8, 8, 0, 6]
    rule.begin(other, 10)
    assert rule.draft(other, 10) == [8], "the rejected draft was that of another answer"


def test_ngram_map_k4v_drafts_where_one_continuation_is_twice_as_frequent_as_the_others() -> None:
    often = [9, 5, 1, 5, 1, 5, 2, 8, 8, 5]
    assert drafted(NgramMap(1, 1, key_only=False), often) == [2], (
        "1 is the most frequent; what followed last is drafted"
    )
    evenly = [9, 5, 1, 5, 2, 8, 8, 5]
    assert drafted(NgramMap(1, 1, key_only=False), evenly) == []
    assert drafted(NgramMap(1, 1, key_only=False, min_hits=2), often) == []


def test_ngram_map_k4v_drafts_from_the_hit_that_is_asked_for() -> None:
    text = [9, 5, 1, 5, 1, 5, 1, 8, 8, 5, 3, 5]
    rule = NgramMap(1, 1, key_only=False, min_hits=2)
    rule.begin(text, 9)
    assert rule.draft(text, 9) == []
    assert rule.draft(text, 11) == [1]


def test_ngram_mod_goes_on_while_the_last_tokens_have_an_entry() -> None:
    text = [1, 2, 3, 4, 1, 2]
    assert drafted(NgramMod(2, 1, 3), text) == [3, 4, 1]
    assert drafted(NgramMod(2, 2, 8), text) == [3, 4, 1], "4, 1 has none: what followed it was not known yet"
    assert drafted(NgramMod(2, 4, 8), text) == [], "three tokens are fewer than the least"
    assert drafted(NgramMod(8, 1, 3), text) == []


def test_ngram_mod_keeps_entries_across_answers_until_five_drafts_in_a_row_were_bad() -> None:
    rule = NgramMod(2, 1, 4)
    rule.begin([1, 2, 3, 4, 5, 6], 6)
    other = [7, 8, 1, 2]
    rule.begin(other, 3)
    for _ in range(5):
        assert rule.draft(other, 3) == [3, 4, 5, 6]
        rule.accepted(0)
    assert rule.draft(other, 3) == []


def test_a_draft_of_which_a_quarter_was_accepted_is_no_bad_one() -> None:
    rule = NgramMod(2, 1, 4)
    rule.begin([1, 2, 3, 4, 5, 6], 6)
    other = [7, 8, 1, 2]
    rule.begin(other, 3)
    for accepted in (0, 0, 0, 0, 1, 0, 0, 0, 0):
        assert rule.draft(other, 3) == [3, 4, 5, 6]
        rule.accepted(accepted)
    assert rule.draft(other, 3) == [3, 4, 5, 6]


def test_ngram_cache_drafts_up_to_eight_tokens_from_counts() -> None:
    assert drafted(NgramCache(), [1, 2, 3, 1, 2, 3, 1, 2]) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert drafted(NgramCache(), [7, 1, 7, 2, 8, 7]) == [], "1 and 2 followed 7 once each: below 66%"


def test_ngram_cache_takes_the_later_one_of_two_that_followed_equally_often() -> None:
    text = [4, 5, 1, 4, 5, 2, 9, 4, 5]
    assert drafted(NgramCache(), text)[:1] == [2], "after 4, 5: 50% each, which is enough for two tokens"


def test_ngram_cache_counts_nothing_across_the_tokens_of_two_passes() -> None:
    rule = NgramCache()
    text = [1, 2, 3, 4, 5, 6, 7, 8, 5, 6]
    rule.begin(text, 3)
    for length in range(3, len(text)):
        rule.draft(text, length)
    assert rule.draft(text, 9) == [], "5, 6 came in two passes"


def test_a_chain_asks_the_next_rule_where_the_first_drafts_nothing_and_tells_the_one_that_drafted() -> None:
    text = [9, 1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 1, 2]
    chain = Chain([NgramSimple(6, 2), NgramMap(2, 2, key_only=True)])
    chain.begin(text, 7)
    assert chain.draft(text, 7) == []
    assert chain.draft(text, 8) == [3, 4]
    chain.accepted(1)
    assert chain.draft(text, 12) == [3]
    first = Chain([NgramSimple(2, 3), VllmNgram(1, 1, 3)])
    assert drafted(first, text) == [3, 7, 1]


PROMPT = (9, 1, 2, 3, 4, 5, 1)


def test_a_replay_counts_passes_by_their_rows() -> None:
    answer = RecordedAnswer(PROMPT, (2, 3, 4, 7, 6), 16)
    found = replayed(answer, NgramSimple(2, 3))
    assert found == Replayed(5, drafted=3, accepted=2, passes={4: 1, 1: 1})
    plain = replayed(answer, None)
    assert plain == Replayed(5, drafted=0, accepted=0, passes={1: 4})
    assert total([found, plain]) == Replayed(10, 3, 2, {4: 1, 1: 5})


def test_a_draft_ends_one_token_before_the_limit_of_the_answer() -> None:
    answer = RecordedAnswer(PROMPT, (2, 3, 4, 5), 4)
    assert replayed(answer, NgramSimple(2, 3)) == Replayed(4, 2, 2, {3: 1})
    unbounded = replayed(answer, NgramSimple(2, 3), bounded=False)
    assert (unbounded.drafted, unbounded.accepted) == (3, 3)


def test_the_end_of_an_answer_counts_as_accepted_only_at_the_end_of_a_draft() -> None:
    ended = RecordedAnswer(PROMPT, (2, 3, 4), 16, ended=True)
    assert replayed(ended, NgramSimple(2, 3)) == Replayed(3, 3, 1, {4: 1})
    assert replayed(ended, NgramSimple(2, 2)) == Replayed(3, 2, 2, {3: 1})


def test_an_end_that_the_server_does_not_tell_is_never_drafted() -> None:
    answer = RecordedAnswer(PROMPT, (2, 3, UNKNOWN), 16, ended=True)
    assert replayed(answer, NgramSimple(2, 3)) == Replayed(3, 3, 1, {4: 1})


def guesses(tokens: list[int], probabilities: list[float]) -> AnswerGuesses:
    import numpy as np

    return AnswerGuesses(np.array(tokens, dtype=np.int32), np.array(probabilities))


def test_a_drafter_drafts_its_guesses_until_it_is_unsure() -> None:
    known = [guesses([11, 12, 0, 14, 15], [0.9, 0.9, 0.4, 0.9, 0.9]), guesses([5, 5], [1.0, 1.0])]
    answer = RecordedAnswer((1, 2), (10, 11, 12, 13, 14), 16)
    # 11, 12 agree, 0 does not; then, after 13, the guess 14
    assert replayed(answer, RecordedDrafter(known, 3)) == Replayed(5, 3 + 2, 2 + 1, {4: 1, 3: 1})
    assert replayed(answer, RecordedDrafter(known, 3, 0.5)) == Replayed(5, 2 + 2, 2 + 1, {3: 2})
    rule = RecordedDrafter(known, 1)
    rule.begin([1, 2, 10], 2)
    rule.begin([1, 7], 1)
    assert rule.draft([1, 7], 1) == [5], "the second answer has guesses of its own"
