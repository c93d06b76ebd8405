from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.core import EMPTY, Draft, Proposer, Stateful, Step, int_array
from specplug.proposers.suffix import Suffix
from specplug.testing import ProposerContract, ToyTarget, replay


class TestContract(ProposerContract):
    def make(self) -> Proposer:
        return Suffix()

    def make_bounded(self) -> Proposer:
        return Suffix(shared_tokens=500)


class TestContractWithoutSharing(ProposerContract):
    def make(self) -> Proposer:
        return Suffix(shared_tokens=0)


X, Y, A, B, C = 10, 11, 1, 2, 3
FORKED = [21, A, B, C, X, 22, A, B, C, Y, 23, A, B, C, Y, 24, A, B, C]
"""A B C is followed by X once and by Y twice, and preceded by another token each time: three matches of length 3."""


def nodes(proposer: Suffix, draft: Draft) -> list[tuple[int, int, str]]:
    why = [proposer.buckets[bucket].name for bucket in draft.buckets.tolist()]
    return list(zip(draft.tokens.tolist(), draft.parents.tolist(), why, strict=True))


def finish(proposer: Suffix, prompt: list[int], answer: list[int], seq: int = 100) -> None:
    proposer.begin(seq, int_array(prompt))
    proposer.observe(seq, Step(answer, EMPTY, []))
    proposer.end(seq)


def paths(draft: Draft) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        found.append((*(() if parent < 0 else found[parent]), token))
    return set(found)


def test_worked_example_of_frequencies() -> None:
    # SuffixDecoding: P(Y | A B C) = 2/3, P(X | A B C) = 1/3, so Y is the first node and X the second.
    proposer = Suffix()
    proposer.begin(0, int_array(FORKED))
    assert nodes(proposer, proposer.propose(0, 2)) == [(Y, -1, "local most 3"), (X, -1, "local some 2")]


def test_worked_example_of_the_tree() -> None:
    # Y was followed by 23 and by 24, X by 22: the draft is the trie of the continuations.
    proposer = Suffix(min_prob=0.0)
    proposer.begin(0, int_array(FORKED))
    draft = proposer.propose(0, 64)
    assert {path for path in paths(draft) if len(path) <= 2} == {(Y,), (X,), (Y, 23), (Y, 24), (X, 22)}


def test_occurrences_that_agree_give_a_chain_whose_buckets_name_their_number() -> None:
    for repeats, support in ((1, "one"), (2, "two"), (3, "many"), (5, "many")):
        text = [token for i in range(repeats) for token in (40 + i, A, B, 8)]
        proposer = Suffix(max_draft=1)
        proposer.begin(0, int_array([*text, 50, A, B]))
        assert nodes(proposer, proposer.propose(0, 4)) == [(8, -1, f"local {support} 2")]


def test_the_match_grows_along_the_draft() -> None:
    proposer = Suffix(min_prob=0.0, max_draft=7)
    proposer.begin(0, int_array([A, 30, 31, 32, 33, 34, 35, 36, A]))
    why = [name for _, _, name in nodes(proposer, proposer.propose(0, 64))]
    # Effective match lengths 1 to 7, in the classes 1, 2, 3, 4-5 and 6-7.
    assert why == [f"local one {length}" for length in (1, 2, 3, 4, 4, 6, 6)]


def test_drafts_are_longer_after_longer_matches() -> None:
    text = list(range(100, 160))
    lengths = []
    for match in (1, 4, 16):
        proposer = Suffix()
        proposer.begin(0, int_array([*text, 5, *text[:match]]))
        lengths.append(len(proposer.propose(0, 64)))
    assert 0 < lengths[0] < lengths[1] < lengths[2]


def test_a_path_is_cut_where_its_probability_falls_below_the_least() -> None:
    prior = {bucket.name: bucket.prior for bucket in Suffix.buckets}
    prompt = int_array([A, 30, 31, 32, A])
    two_nodes = prior["local one 1"] * prior["local one 2"]
    for floor, expected in ((two_nodes * 0.99, 2), (two_nodes * 1.01, 1), (prior["local one 1"] * 1.01, 0)):
        proposer = Suffix(min_prob=floor, max_draft=2)
        proposer.begin(0, prompt)
        assert len(proposer.propose(0, 64)) == expected


def test_finished_answers_are_drafted_from() -> None:
    proposer = Suffix(max_draft=2, min_prob=0.0)
    finish(proposer, [1, 2], [30, 31, 32, 33])
    proposer.begin(0, int_array([5, 30, 31]))
    assert nodes(proposer, proposer.propose(0, 9)) == [(32, -1, "shared one 2"), (33, 0, "shared one 3")]


def test_of_a_prompt_only_the_end_before_the_answer_is_stored() -> None:
    proposer = Suffix(min_prob=0.0)
    finish(proposer, list(range(30, 60)), [70, 71])
    proposer.begin(0, int_array([5, 31, 32]))
    assert len(proposer.propose(0, 9)) == 0
    proposer.begin(1, int_array([5, 58, 59]))
    assert proposer.propose(1, 9).tokens.tolist() == [70, 71]


def test_a_draft_never_continues_into_the_next_answer() -> None:
    proposer = Suffix(min_prob=0.0)
    finish(proposer, [1], [30, 31, 32])
    finish(proposer, [1], [40, 41])
    proposer.begin(0, int_array([5, 30, 31]))
    assert proposer.propose(0, 9).tokens.tolist() == [32]
    proposer.begin(1, int_array([5, 31, 32]))
    assert len(proposer.propose(1, 9)) == 0


def test_the_text_itself_is_preferred_to_other_answers() -> None:
    proposer = Suffix(max_draft=1, min_prob=0.0)
    finish(proposer, [1], [A, B, X])
    finish(proposer, [1], [A, B, Y])
    proposer.begin(0, int_array([A, B, Y, 9, A, B]))
    first, second = nodes(proposer, proposer.propose(0, 9))
    assert first == (Y, -1, "local one 2")
    assert second == (X, -1, "shared some 2")


def test_running_sequences_do_not_see_each_other() -> None:
    proposer = Suffix()
    proposer.begin(0, int_array([30, 31, 32, 33]))
    proposer.begin(1, int_array([5, 30, 31]))
    assert len(proposer.propose(1, 9)) == 0


def test_the_oldest_answers_are_dropped_first_and_completely() -> None:
    # Each answer takes 1 token of its prompt, 4 of its own and a separator: 6. Two of them fit into 15.
    proposer = Suffix(shared_tokens=15, min_prob=0.0)
    for start in (30, 40, 50):
        finish(proposer, [1], [start, start + 1, start + 2, start + 3])
    for start, expected in ((30, []), (40, [42, 43]), (50, [52, 53])):
        proposer.begin(start, int_array([5, start, start + 1]))
        assert proposer.propose(start, 9).tokens.tolist() == expected


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(0, 60))
def test_the_shared_store_never_exceeds_its_bound(lengths: list[int], bound: int) -> None:
    proposer = Suffix(shared_tokens=bound)
    for seq, length in enumerate(lengths):
        finish(proposer, [1], list(range(length)), seq)
        assert len(proposer.shared_index.tokens) == sum(proposer.shared_lengths) <= bound


def test_state_survives_a_round_trip() -> None:
    proposer, restored = Suffix(min_prob=0.0), Suffix(min_prob=0.0)
    assert isinstance(proposer, Stateful)
    finish(proposer, [1, 2], [30, 31, 32, 33])
    finish(proposer, [1, 2], [30, 31, 34, 35])
    restored.load_state(proposer.state())
    for each in (proposer, restored):
        each.begin(0, int_array([5, 30, 31]))
    draft, same = proposer.propose(0, 9), restored.propose(0, 9)
    assert paths(draft) >= {(32,), (34,)}
    assert nodes(restored, same) == nodes(proposer, draft)


def test_a_state_larger_than_the_bound_keeps_the_newest_answers() -> None:
    proposer, small = Suffix(), Suffix(shared_tokens=8, min_prob=0.0)
    finish(proposer, [1], [30, 31, 32])
    finish(proposer, [1], [40, 41, 42])
    small.load_state(proposer.state())
    assert small.shared_index.tokens == [1, 40, 41, 42, -1]


@pytest.mark.parametrize(
    "state",
    [
        {"tokens": np.zeros(3, np.int64), "lengths": np.array([3], np.int32)},
        {"tokens": np.zeros((3, 1), np.int32), "lengths": np.array([3], np.int32)},
        {"tokens": np.zeros(3, np.int32), "lengths": np.array([2], np.int32)},
        {"tokens": np.zeros(3, np.int32), "lengths": np.array([4, -1], np.int32)},
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tokens"):
        Suffix().load_state(state)


def test_a_proposer_that_is_not_asked_indexes_nothing() -> None:
    # This looks at private state, as lazy indexing is visible nowhere else.
    proposer = Suffix()
    proposer.begin(0, int_array([1, 2, 3]))
    for _ in range(50):
        proposer.observe(0, Step([1, 2, 3], EMPTY, []))
    assert proposer._running[0].index._indexed == 0
    proposer.propose(0, 4)
    assert proposer._running[0].index._indexed == 3 + 150 - 1


BEFORE = """the drafter proposes a few tokens and the target checks all of them in one pass if the target
would have said the same token it is kept at no further cost and where the two differ the rest is thrown away so the
text never changes"""
AFTER = """the proposer proposes a few tokens and the target verifies all of them in one pass if the target
would have said the same token it is kept at no further cost and where the two differ the rest is dropped so the
text never changes"""


def test_an_edited_text_is_mostly_copied() -> None:
    # 46 words, three of them new: runs of 1, 7, 30 and 5. A new word has no match (1 step); no trigram repeats, so
    # after 2 more steps the match is unique; from then on a step emits 8 draft tokens and the target's own, and the
    # next new word is the last of these. Steps at most: 2 (the first run) + (3 + 1) + (3 + 4) + (3 + 1) = 17.
    ids = {word: i for i, word in enumerate(dict.fromkeys((BEFORE + " " + AFTER).split()))}
    before, after = ([ids[word] for word in text.split()] for text in (BEFORE, AFTER))
    result = replay(Suffix(), [*before, len(ids)], after, budget=8)
    assert result.emitted == after
    assert result.mean_acceptance_length >= 46 / 17


def test_copying_distinct_words_is_fast_from_the_second_word_on() -> None:
    # 1 step without a match, 1 step with a match of one; then 16 draft tokens and the target's own: below 2 + 59 / 17.
    words = list(range(60))
    result = replay(Suffix(), [*words, 99], words, budget=16)
    assert len(result.steps) <= 6


def test_loops_of_the_toy_target_are_drafted() -> None:
    # Its greedy text depends on 3 tokens and so ends in a loop, in which every token is predictable.
    target = ToyTarget(vocab=16, seed=3)
    text = target.greedy([1, 2, 3], 400)
    assert text[-200:-100] in (text[i : i + 100] for i in range(100, 200))
    result = replay(Suffix(), [1, 2, 3, *text[:200]], text[200:], budget=16)
    assert result.mean_acceptance_length >= 10


@pytest.mark.parametrize(
    "options", [{"max_draft": 0}, {"occurrences": 0}, {"shared_tokens": -1}, {"min_prob": 1.5}, {"min_prob": -0.1}]
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Suffix(**options)
