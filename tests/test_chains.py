"""Chains for many sequences: their form, the adapter for trees, and that arrays give the drafts of single sequences."""

import numpy as np
import pytest

from specplug.core import EMPTY, Draft, Step, int_array
from specplug.drafts.chains import NOTHING, Chains, ChainSteps, TreeAdapter, as_chains, likeliest_chain
from specplug.proposers.ngram import Ngram
from specplug.proposers.suffix import Suffix
from specplug.proposers.token_recycling import ROW, START, TokenRecycling
from specplug.testing import ToyTarget


def steps(
    seqs: list[int], last: list[int], emitted: list[list[int]], topk: list[list[int]] | None = None
) -> ChainSteps:
    before = [token for one, tokens in zip(last, emitted, strict=True) for token in [one, *tokens[:-1]]]
    after = [token for tokens in emitted for token in tokens]
    read = before if topk else []
    rows = np.array(topk, dtype=np.int32) if topk else None
    return ChainSteps(seqs, emitted, int_array(before), int_array(after), int_array(read), rows)


@pytest.mark.parametrize(
    ("tokens", "buckets", "message"),
    [
        ([[1, 2]], [[0, 0]], "shapes"),
        ([[1, 2, 3]], [[0, 0, 9]], "bucket"),
        ([[1, 2, 50]], [[0, 0, 0]], "vocabulary"),
        ([[-2, 2, 3]], [[0, 0, 0]], "vocabulary"),
        ([[1, NOTHING, 3]], [[0, 0, 0]], "gap"),
    ],
)
def test_malformed_chains_are_refused(tokens: list[list[int]], buckets: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chains(np.array(tokens, dtype=np.int32), np.array(buckets, dtype=np.int32)).check(
            1, 3, num_tokens=50, num_buckets=4
        )
    with pytest.raises(ValueError, match="int32"):
        Chains(np.zeros((1, 3)), np.zeros((1, 3))).check(1, 3, num_tokens=50, num_buckets=4)  # type: ignore[arg-type]


def test_ragged_lists_are_padded() -> None:
    chains = Chains.of([[5, 6], []], [[1, 2], []], 3)
    assert chains.tokens.tolist() == [[5, 6, NOTHING], [NOTHING] * 3]
    assert chains.buckets.tolist() == [[1, 2, 0], [0, 0, 0]]
    chains.check(2, 3, num_tokens=7, num_buckets=3)
    Chains.of([], [], 3).check(0, 3, num_tokens=7, num_buckets=3)


def test_of_a_tree_the_path_with_the_most_expected_tokens_is_chosen() -> None:
    # The first child alone is likelier (0.5), but the path of the second sums to 0.4 + 0.36 + 0.324 = 1.084.
    tree = Draft.of([1, 2, 3, 4], [-1, -1, 1, 2], [0, 1, 2, 2])
    assert likeliest_chain(tree, [0.5, 0.4, 0.9]).tokens.tolist() == [2, 3, 4]
    assert likeliest_chain(tree, [0.9, 0.2, 0.2]).tokens.tolist() == [1]
    assert len(likeliest_chain(EMPTY, [])) == 0


def test_an_adapted_proposer_of_trees_drafts_for_many_and_observes_every_token() -> None:
    proposer = as_chains(Ngram())
    assert isinstance(proposer, TreeAdapter)
    proposer.begin(3, int_array([1, 2, 3, 9, 1, 2, 3]))
    proposer.begin(4, int_array([5, 6, 7]))
    chains = proposer.propose_chains([4, 3], 2)
    assert chains.tokens.tolist() == [[NOTHING, NOTHING], [9, 1]]
    proposer.observe_chains(steps([3], [3], [[9, 1, 2]]))
    assert proposer.propose_chains([3], 3).tokens.tolist() == [[3, 9, 1]]
    assert as_chains(Suffix()).__class__ is Suffix


def test_too_large_a_tree_is_refused() -> None:
    class Greedy(Ngram):
        def propose(self, seq: int, budget: int) -> Draft:
            return Draft.chain([1] * (budget + 1), [0] * (budget + 1))

    with pytest.raises(ValueError, match="17 nodes; at most 16 were asked"):
        as_chains(Greedy()).propose_chains([1], 4)


def test_suffix_chains_follow_the_likeliest_continuation() -> None:
    suffix = Suffix(min_prob=0.0)
    # 1 2 was followed by 7 once and later by 3 4 twice.
    suffix.begin(1, int_array([1, 2, 7, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]))
    assert suffix.propose_chains([1], 3).tokens.tolist() == [[3, 4, 0]]
    suffix.begin(2, int_array([30, 31, 32]))
    assert suffix.propose_chains([2, 1], 2).tokens.tolist() == [[NOTHING] * 2, [3, 4]]
    suffix.observe_chains(steps([1], [2], [[3, 4]]))
    assert suffix.propose_chains([1], 2).tokens.tolist() == [[0, 1]]


def test_recycling_chains_follow_the_rows() -> None:
    recycling = TokenRecycling(k=2)
    recycling.begin(1, int_array([10, 11]))
    recycling.begin(2, int_array([20, 21]))
    # After 11 the target ranked 12 and 13 highest, after 21 it ranked 11 and 5. It emitted 12 and 11.
    recycling.observe_chains(steps([1, 2], [11, 21], [[12], [11]], [[12, 13], [11, 5]]))
    chains = recycling.propose_chains([1, 2], 3)
    assert chains.tokens.tolist() == [[NOTHING] * 3, [12, NOTHING, NOTHING]]
    # The row of 11 is from top ids, and nothing was counted for it yet: rank 0 of that kind.
    assert recycling.buckets[chains.buckets[1, 0]].name == f"row {START} rank 0"
    assert recycling.shared_kind[11] == ROW + START


def test_learning_from_arrays_is_learning_one_by_one() -> None:
    """For sequences that share no token, both ways result in the same rows, and in nearly the same counts."""
    one, many = TokenRecycling(k=4), TokenRecycling(k=4)
    target = ToyTarget(vocab=40, seed=3)
    texts = {seq: [seq * 40 + token for token in target.greedy(target.prompt(8, seq), 30)] for seq in range(3)}
    for seq, text in texts.items():
        one.begin(seq, int_array(text[:6]))
        many.begin(seq, int_array(text[:6]))
    for place in range(6, 30, 2):
        emitted = [text[place : place + 2] for text in texts.values()]
        for seq, tokens in zip(texts, emitted, strict=True):
            for token in tokens:
                one.observe(seq, Step([token], EMPTY, []))
        many.observe_chains(steps(list(texts), [text[place - 1] for text in texts.values()], emitted))
    assert (one.shared_matrix == many.shared_matrix).all()
    assert np.allclose(one.shared_probability, many.shared_probability, atol=0.01)
    assert (
        np.abs(one.shared_kind - many.shared_kind).max() <= 1
    )  # the counter of a token that occurs twice in one step moves once
    tokens = many.propose_chains([0, 1, 2], 4).tokens
    for row, seq in enumerate(texts):
        first = one.propose(seq, 1).tokens
        assert tokens[row, 0] == (first[0] if len(first) else NOTHING)
