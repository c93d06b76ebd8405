"""The plan of a batch against every other choice, back-off of proposers, and the fusion of their chains."""

from collections.abc import Sequence
from itertools import count, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specplug.core import Bucket, IntArray, Requires, int_array
from specplug.drafts.chains import Chains, ChainSteps
from specplug.planning.batch_speculator import BatchPlan, BatchSpeculator, batch_cost
from specplug.planning.constants import PLAIN_INTERVAL
from specplug.planning.cost import BatchCost, CostCurve
from specplug.profile import CostPoints

K = 3


class Fixed:
    """Drafts the same chain for every sequence; `priors` are those of its positions."""

    def __init__(self, tokens: Sequence[int], priors: Sequence[float], topk: int = 0) -> None:
        self.tokens = list(tokens)
        self.requires = Requires(topk=topk)
        self.buckets = tuple(Bucket(f"place {place}", prior) for place, prior in enumerate(priors))
        self.asked = 0
        self.observed: list[ChainSteps] = []
        self.ended: list[int] = []

    def begin(self, seq: int, prompt: IntArray) -> None:
        pass

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        self.asked += 1
        tokens = self.tokens[:k]
        return Chains.of([tokens] * len(seqs), [list(range(len(tokens)))] * len(seqs), k)

    def observe_chains(self, steps: ChainSteps) -> None:
        self.observed.append(steps)

    def end(self, seq: int) -> None:
        self.ended.append(seq)


def flat(ms: Sequence[float]) -> BatchCost:
    return BatchCost({1: CostCurve([0], range(1, len(ms) + 1), [ms])})


def speculator(sources: Sequence[Fixed], ms: Sequence[float], **options: bool) -> BatchSpeculator:
    names = [f"proposer {index}" for index in range(len(sources))]
    return BatchSpeculator(sources, names, flat(ms), k=K, clock=count(step=20_000).__next__, **options)


def plan(one: BatchSpeculator, seqs: Sequence[int], budgets: Sequence[int] | None = None) -> BatchPlan:
    assert one.should_draft()
    return one.plan(seqs, len(seqs), 0, int_array(budgets or [K] * len(seqs)))


def emitted(seqs: Sequence[int], tokens: Sequence[Sequence[int]]) -> ChainSteps:
    after = [token for line in tokens for token in line]
    return ChainSteps(seqs, tokens, int_array([0] * len(after)), int_array(after), int_array([]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_plan_is_the_best_of_all_lengths(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 3))
    likely = data.draw(st.lists(st.floats(0.05, 0.99), min_size=n * K, max_size=n * K))
    ms = data.draw(st.lists(st.floats(1.0, 10.0), min_size=n * (K + 1), max_size=n * (K + 1)))
    one = speculator([Fixed([1, 2, 3], [0.5] * K)], ms)
    path = np.cumprod(np.array(likely).reshape(n, K), axis=1)
    lengths, expected = one._choose(path, n, np.array(ms))
    best = max(
        (n + sum(path[i, :length].sum() for i, length in enumerate(choice))) / ms[n + sum(choice) - 1]
        for choice in product(range(K + 1), repeat=n)
    )
    rate = expected / ms[n + int(lengths.sum()) - 1]
    # Plain decoding is preferred to drafts that are hardly better.
    assert rate >= best / 1.02 - 1e-9
    assert expected == pytest.approx(n + sum(path[i, :length].sum() for i, length in enumerate(lengths)))


def test_the_rows_go_to_the_likeliest_draft_tokens() -> None:
    # Two sequences with the same chain; the second has a budget of one token. Up to five rows cost the same.
    one = speculator([Fixed([1, 2, 3], [0.9, 0.8, 0.1])], [10, 10, 10, 10, 10, 100, 100, 100])
    assert plan(one, [0, 1], [3, 1]).lengths.tolist() == [2, 1]
    assert plan(one, [0, 1], [0, 0]).lengths.tolist() == [0, 0]


def test_where_n_rows_cost_n_times_one_nothing_is_verified() -> None:
    found = plan(speculator([Fixed([1, 2, 3], [0.9, 0.8, 0.1])], [10.0 * n for n in range(1, 9)]), [0, 1])
    assert found.lengths.tolist() == [0, 0] and found.expected_tokens == 2.0


def test_more_sequences_than_were_measured_get_no_drafts() -> None:
    assert plan(speculator([Fixed([1], [0.9])], [1.0, 1.0]), [0, 1, 2]).lengths.tolist() == [0, 0, 0]


def test_uniform_is_all_or_nothing() -> None:
    free = plan(speculator([Fixed([1], [0.9])], [10.0] * 8, uniform=True), [0, 1])
    assert free.lengths.tolist() == [K, K] and free.chains.tokens[0].tolist() == [1, -1, -1]
    short = plan(speculator([Fixed([1], [0.9])], [10.0] * 8, uniform=True), [0, 1], [K - 1, K])
    assert short.lengths.tolist() == [0, K]
    costly = plan(speculator([Fixed([1], [0.9])], [10.0] * 4 + [40.0] * 4, uniform=True), [0, 1])
    assert costly.lengths.tolist() == [0, 0]


def test_uniform_is_all_or_nothing_under_a_static_plan_too() -> None:
    one = speculator([Fixed([1], [0.01])], [1000.0 * n for n in range(1, 9)], static=True, uniform=True)
    assert plan(one, [0, 1], [K - 1, K]).lengths.tolist() == [0, K]
    empty = speculator([Fixed([], [])], [1.0] * 8, static=True, uniform=True)
    assert plan(empty, [0, 1]).lengths.tolist() == [0, 0]


def test_static_verifies_everything() -> None:
    found = plan(
        speculator([Fixed([1, 2], [0.01, 0.01])], [1000.0 * n for n in range(1, 9)], static=True), [0, 1], [3, 1]
    )
    assert found.lengths.tolist() == [2, 1]


def test_the_chain_with_the_most_expected_tokens_is_taken_and_agreement_counts() -> None:
    first, second = Fixed([1, 2, 3], [0.5, 0.5, 0.5]), Fixed([1, 2, 9], [0.9, 0.9, 0.1])
    found = plan(speculator([first, second], [10.0] * 16, static=True), [0])
    assert found.chains.tokens.tolist() == [[1, 2, 9]] and found.owners.tolist() == [[-1, -1, 1]]
    table = speculator([first, second], [10.0] * 16).table
    names = [table.buckets[bucket].name for bucket in found.chains.buckets[0]]
    assert names == ["proposer 1 place 0, agreed", "proposer 1 place 1, agreed", "proposer 1 place 2"]
    # The odds of 0.9 double where another proposer drafts the same token: 18 to 1.
    assert found.path[0, 0] == pytest.approx(18 / 19)


def test_a_proposer_that_never_pays_backs_off_and_one_that_pays_does_not() -> None:
    useless, useful = Fixed([7], [0.02]), Fixed([1, 2, 3], [0.95] * K)
    one = speculator([useless, useful], [0.5, *[0.6] * 7])
    steps = 0
    while useless.asked < 5:
        steps += 1
        assert one.should_draft()
        one.plan([0], 1, 0, int_array([K]))
        one.observe(emitted([0], [[1, 2, 3, 4]]))
    assert steps > 20 and useful.asked == steps


def test_a_proposer_that_takes_longer_than_a_millisecond_is_asked_while_it_saves_more() -> None:
    """Two sequences, 30 ms per pass. Asking takes 5 ms; six likely draft tokens save more than a pass."""
    slow = Fixed([1, 2, 3], [0.95] * K)
    ticks = count(step=5_000_000).__next__
    one = BatchSpeculator([slow], ["slow"], flat([30.0] * 8), k=K, clock=ticks)
    for step in range(1, 21):
        plan(one, [0, 1])
        one.observe(emitted([0, 1], [[1, 2, 3, 4]] * 2))
        assert slow.asked == step


def test_in_a_cooldown_of_all_proposers_none_is_asked() -> None:
    source = Fixed([7], [0.02], topk=8)
    one = speculator([source], [0.5 * n for n in range(1, 9)])
    asked = [one.should_draft() and one.plan([0], 1, 0, int_array([K])) is not None for _ in range(60)]
    assert asked[0] and sum(asked) == source.asked < 12
    assert one.wants_topk == (8 if asked[-1] else 0)


def test_acceptance_is_learned_from_drafts_verified_or_not() -> None:
    one = speculator([Fixed([1, 2, 3], [0.5] * K)], [10.0 * n for n in range(1, 9)], static=True)
    for _ in range(200):
        plan(one, [0, 1])
        one.observe(emitted([0, 1], [[1, 5], [1, 2, 3]]))
    # The first token is always right, the second in half of the cases, the third whenever the second is.
    assert [round(p, 1) for p in one.table.probability] == [1.0, 0.5, 1.0]


def test_an_ended_sequence_is_forgotten() -> None:
    source = Fixed([1], [0.5])
    one = speculator([source], [10.0] * 8)
    one.begin(5, int_array([1]))
    plan(one, [5])
    one.end(5)
    assert source.ended == [5] and not one._last_chains
    one.observe(emitted([5], [[1]]))
    assert one.table.learned() == {}


def test_costs_between_two_batches_lie_between_their_curves() -> None:
    cost = BatchCost({1: CostCurve([0], [1, 8], [[1.0, 8.0]]), 4: CostCurve([0], [1, 16], [[5.0, 5.0]])})
    assert [float(cost.at(n, 0)[3]) for n in (1, 3, 4, 9)] == pytest.approx([4.0, 4 + 2 / 3, 5.0, 5.0])
    assert [len(cost.at(n, 0)) for n in (1, 2, 4, 9)] == [8, 16, 16, 16]
    assert float(cost.at(2, 0)[15]) == pytest.approx(
        16 * 2 / 3 + 5 / 3
    )  # the smaller one continues with its mean slope
    assert len(cost.at(4, 0)) == 16
    for _ in range(400):
        cost.observe(4, 4, 0, 10.0)
    assert float(cost.at(4, 0)[3]) > 6.0 and float(cost.at(1, 0)[3]) == 4.0


def test_a_plain_pass_is_due_by_the_curve_of_the_batch() -> None:
    """After passes of 12 rows for 4 sequences one without drafts is due; other batch sizes are not affected."""
    cost = BatchCost(
        {size: CostCurve([0], [1, *range(size, 36)], [[9.0, *map(float, range(9, 45 - size))]]) for size in (2, 4)}
    )
    one = BatchSpeculator([Fixed([1], [0.9])], ["fixed"], cost, k=K)
    asked = []
    for _ in range(PLAIN_INTERVAL + 2):
        asked.append(one.should_draft(4))
        cost.observe(4, 12 if asked[-1] else 4, 0, 17.0 if asked[-1] else 9.0)
    assert asked == [True] * PLAIN_INTERVAL + [False, True]
    for _ in range(PLAIN_INTERVAL):
        cost.observe(4, 12, 0, 17.0)
    assert one.should_draft(2) and one.should_draft() and not one.should_draft(4)


def test_one_plain_pass_is_enough_whatever_the_form_of_the_curve() -> None:
    """In this curve of 4 sequences one row takes less time than four."""
    cost = batch_cost([CostPoints((0,), tuple(range(1, 36)), (tuple(float(ms) for ms in range(9, 44)),), 4)])
    one = BatchSpeculator([Fixed([1], [0.9])], ["fixed"], cost, k=K)
    asked = []
    for _ in range(2 * PLAIN_INTERVAL + 2):
        asked.append(one.should_draft(4))
        cost.observe(4, 7 if asked[-1] else 4, 0, float(cost.at(4, 0)[6 if asked[-1] else 3]))
    assert asked == [*[True] * PLAIN_INTERVAL, False] * 2


@pytest.mark.parametrize("sequences", [3, 9])
def test_a_batch_without_a_curve_of_its_own_continues_to_draft(sequences: int) -> None:
    """No pass of it counts as plain for the curve that is used instead, so that one would be due for ever."""
    cost = BatchCost({size: CostCurve([0], range(1, 36), [list(range(9, 44))]) for size in (2, 4)})
    one = BatchSpeculator([Fixed([1], [0.9])], ["fixed"], cost, k=K)
    for _ in range(3 * PLAIN_INTERVAL):
        assert one.should_draft(sequences)
        cost.observe(sequences, sequences + 3, 0, 20.0)


def test_costs_that_stopped_drafts_return_to_the_measured_ones_in_plain_decoding() -> None:
    line = [10.0, *(10.0 + rows for rows in range(1, 33))]
    cost = BatchCost({4: CostCurve([0], [1, *range(4, 36)], [[10.0, *line[:-1]]])})
    before = float(cost.at(4, 0)[11])
    for _ in range(400):
        cost.observe(4, 12, 0, 1000.0)
    risen = float(cost.at(4, 0)[11])
    for _ in range(4000):
        cost.observe(4, 4, 0, 10.0)
    assert risen > 2 * before and float(cost.at(4, 0)[11]) < before + (risen - before) / 2
