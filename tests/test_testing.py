"""The contract must reject broken proposers: each one here breaks one rule, and the test of that rule must fail."""

import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from specplug.core import EMPTY, Bucket, Draft, IntArray, Proposer, Requires, Step, int_array
from specplug.testing import ProposerContract, ToyTarget, replay, verify_known


class Echo:
    """A correct proposer: it repeats the last token."""

    requires = Requires()
    buckets: tuple[Bucket, ...] = (Bucket("echo", 0.1),)

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._last[seq] = int(prompt[-1]) if len(prompt) else 0

    def propose(self, seq: int, budget: int) -> Draft:
        n = min(budget, 3)
        return Draft.chain([self._last[seq]] * n, [0] * n)

    def observe(self, seq: int, step: Step) -> None:
        if seq not in self._last:
            raise KeyError(seq)
        self._last[seq] = step.emitted[-1]

    def end(self, seq: int) -> None:
        del self._last[seq]


class OverBudget(Echo):
    def propose(self, seq: int, budget: int) -> Draft:
        return Draft.chain([self._last[seq]] * 3, [0] * 3)


class OutsideTheVocabulary(Echo):
    def propose(self, seq: int, budget: int) -> Draft:
        self._last[seq]
        return Draft.chain([10_000], [0]) if budget else EMPTY


class UnnamedBucket(Echo):
    def propose(self, seq: int, budget: int) -> Draft:
        self._last[seq]
        return Draft.chain([1], [1]) if budget else EMPTY


class BucketsOfTheSameName(Echo):
    buckets = (Bucket("echo", 0.1), Bucket("echo", 0.2))


class PriorAboveOne(Echo):
    buckets = (Bucket("echo", 1.5),)


class FailsOnAnEmptyPrompt(Echo):
    def begin(self, seq: int, prompt: IntArray) -> None:
        self._last[seq] = int(prompt[-1])


class DiffersBetweenInstances(Echo):
    instances = 0

    def __init__(self) -> None:
        super().__init__()
        DiffersBetweenInstances.instances += 1
        self._number = DiffersBetweenInstances.instances

    def propose(self, seq: int, budget: int) -> Draft:
        self._last[seq]
        return Draft.chain([self._number % 7], [0]) if budget else EMPTY


class CountsCalls(Echo):
    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def propose(self, seq: int, budget: int) -> Draft:
        self._last[seq]
        self._calls += 1
        return Draft.chain([self._calls % 64], [0]) if budget else EMPTY


class WritesIntoThePrompt(Echo):
    def begin(self, seq: int, prompt: IntArray) -> None:
        super().begin(seq, prompt)
        prompt[0] += 1


class WritesIntoTheStep(Echo):
    def observe(self, seq: int, step: Step) -> None:
        super().observe(seq, step)
        step.emitted[-1] = 0


class KeepsThePrompt(Echo):
    def __init__(self) -> None:
        super().__init__()
        self._prompt: dict[int, IntArray] = {}

    def begin(self, seq: int, prompt: IntArray) -> None:
        super().begin(seq, prompt)
        self._prompt[seq] = prompt

    def propose(self, seq: int, budget: int) -> Draft:
        return Draft.chain([int(self._prompt[seq][-1])], [0]) if budget else EMPTY

    def end(self, seq: int) -> None:
        super().end(seq)
        del self._prompt[seq]


class MixesSequences(Echo):
    def propose(self, seq: int, budget: int) -> Draft:
        self._last[seq]
        n = min(budget, 3)
        return Draft.chain([max(self._last.values())] * n, [0] * n)


class KeepsEndedSequences(Echo):
    def __init__(self) -> None:
        super().__init__()
        self._old: list[int] = []

    def end(self, seq: int) -> None:
        self._old.append(self._last[seq])
        self._old.extend(range(8))
        super().end(seq)


class SharesWithoutBound(Echo):
    def __init__(self) -> None:
        super().__init__()
        self.shared_answers: list[int] = []

    def end(self, seq: int) -> None:
        super().end(seq)
        self.shared_answers += [seq] * 50


class RemembersTheSequenceNumber(Echo):
    def __init__(self) -> None:
        super().__init__()
        self._ended: set[int] = set()

    def propose(self, seq: int, budget: int) -> Draft:
        self._last[seq]
        return EMPTY if seq in self._ended else super().propose(seq, budget)

    def end(self, seq: int) -> None:
        super().end(seq)
        self._ended.add(seq)


class IgnoresTheBudgetsOfABatch(Echo):
    def propose_batch(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[Draft]:
        return [self.propose(seq, 3) for seq in seqs]


class AcceptsUnknownSequences(Echo):
    def end(self, seq: int) -> None:
        self._last.pop(seq, None)


class ExpectsItsOwnDraft(Echo):
    def observe(self, seq: int, step: Step) -> None:
        assert len(step.draft) in (0, 3)
        super().observe(seq, step)


class ExpectsTopIds(Echo):
    requires = Requires(topk=4)

    def observe(self, seq: int, step: Step) -> None:
        super().observe(seq, step)
        assert step.topk is not None
        self.best = int(step.topk[0][3])


class ReadsBucketsOfTheStep(Echo):
    def observe(self, seq: int, step: Step) -> None:
        super().observe(seq, step)
        self.last_bucket = [self.buckets[bucket] for bucket in step.draft.buckets.tolist()][-1:]


class ExpectsTheTargetsOwnToken(Echo):
    def observe(self, seq: int, step: Step) -> None:
        super().observe(seq, step)
        self._last[seq] = step.emitted[len(step.accepted)]


BROKEN: list[tuple[type[Echo], Callable[[ProposerContract], None]]] = [
    (OverBudget, ProposerContract.test_drafts_are_well_formed_and_within_budget),
    (OutsideTheVocabulary, ProposerContract.test_drafts_are_well_formed_and_within_budget),
    (UnnamedBucket, ProposerContract.test_drafts_are_well_formed_and_within_budget),
    (BucketsOfTheSameName, ProposerContract.test_buckets_are_named_once_with_a_probability),
    (PriorAboveOne, ProposerContract.test_buckets_are_named_once_with_a_probability),
    (FailsOnAnEmptyPrompt, ProposerContract.test_shortest_prompts),
    (DiffersBetweenInstances, ProposerContract.test_same_inputs_give_the_same_drafts),
    (CountsCalls, ProposerContract.test_propose_changes_nothing_visible),
    (WritesIntoThePrompt, ProposerContract.test_prompt_and_step_stay_as_they_were),
    (WritesIntoTheStep, ProposerContract.test_prompt_and_step_stay_as_they_were),
    (WritesIntoTheStep, ProposerContract.test_text_is_the_targets),
    (KeepsThePrompt, ProposerContract.test_later_changes_to_the_prompt_do_not_matter),
    (MixesSequences, ProposerContract.test_sequences_do_not_mix),
    (IgnoresTheBudgetsOfABatch, ProposerContract.test_a_batch_gets_the_drafts_of_its_sequences),
    (KeepsEndedSequences, ProposerContract.test_end_forgets_the_sequence),
    (SharesWithoutBound, ProposerContract.test_shared_state_is_bounded),
    (RemembersTheSequenceNumber, ProposerContract.test_a_sequence_number_can_be_used_again),
    (AcceptsUnknownSequences, ProposerContract.test_unknown_sequences_are_refused),
    (ExpectsItsOwnDraft, ProposerContract.test_any_draft_may_have_been_verified),
    (ExpectsTopIds, ProposerContract.test_a_step_may_lack_top_ids_and_name_buckets_of_a_fusion),
    (ReadsBucketsOfTheStep, ProposerContract.test_a_step_may_lack_top_ids_and_name_buckets_of_a_fusion),
    (ExpectsTheTargetsOwnToken, ProposerContract.test_generation_may_stop_inside_the_accepted_path),
]


class TestContractOfACorrectProposer(ProposerContract):
    def make(self) -> Proposer:
        return Echo()


class EchoBatch(Echo):
    def propose_batch(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[Draft]:
        return [self.propose(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]


class TestContractOfACorrectBatchProposer(ProposerContract):
    def make(self) -> Proposer:
        return EchoBatch()


@pytest.mark.parametrize(("broken", "test"), BROKEN, ids=lambda value: value.__name__)
def test_the_contract_rejects(broken: type[Echo], test: Callable[[ProposerContract], None]) -> None:
    class Contract(ProposerContract):
        def make(self) -> Proposer:
            return broken()

    with pytest.raises((AssertionError, IndexError, ValueError)):
        test(Contract())


def test_every_rule_has_a_proposer_that_breaks_it() -> None:
    rules = {name for name in dir(ProposerContract) if name.startswith("test_")}
    assert rules == {test.__name__ for _, test in BROKEN}


def test_shared_state_of_a_part_is_found() -> None:
    class Fusion(Echo):
        def __init__(self) -> None:
            super().__init__()
            self._part = SharesWithoutBound()

        def end(self, seq: int) -> None:
            super().end(seq)
            self._part.shared_answers += [seq] * 50

    class Contract(ProposerContract):
        def make(self) -> Proposer:
            return Fusion()

    Contract().test_end_forgets_the_sequence()
    with pytest.raises(AssertionError, match="keeps growing"):
        Contract().test_shared_state_is_bounded()


class Oracle(Echo):
    """Knows the text in advance and drafts it as a chain."""

    def __init__(self, text: list[int]) -> None:
        super().__init__()
        self._rest = text

    def propose(self, seq: int, budget: int) -> Draft:
        return Draft.chain(self._rest[:budget], [0] * len(self._rest[:budget]))

    def observe(self, seq: int, step: Step) -> None:
        self._rest = self._rest[len(step.emitted) :]


@pytest.mark.parametrize(("budget", "steps"), [(0, 20), (1, 10), (4, 4), (18, 2), (19, 1), (64, 1)])
def test_replay_of_an_oracle_takes_n_over_budget_plus_one_steps(budget: int, steps: int) -> None:
    text = ToyTarget().greedy([1], 20)
    result = replay(Oracle(text), [1], text, budget)
    assert result.emitted == text
    assert len(result.steps) == steps
    assert result.mean_acceptance_length == 20 / steps


def test_verification_walks_the_tree() -> None:
    #      5          6          after the root: 5 or 6
    #    7   8      7            after 5: 7 or 8; after 6: 7
    draft = Draft.of([5, 6, 7, 8, 7], [-1, -1, 0, 0, 1], [0] * 5)
    for rest, accepted, emitted in (
        ([6, 7, 9], [1, 4], [6, 7, 9]),
        ([5, 8, 1, 2], [0, 3], [5, 8, 1]),
        ([8], [], [8]),
    ):
        step = verify_known(draft, rest)
        assert (step.accepted, step.emitted) == (accepted, emitted)


def test_a_text_that_ends_inside_the_tree_emits_no_token_of_the_targets_own() -> None:
    step = verify_known(Draft.chain([5, 6, 7], [0, 0, 0]), [5, 6])
    assert (step.accepted, step.emitted) == ([0, 1], [5, 6])


def test_topk_rows_belong_to_the_root_and_then_to_each_node_in_its_own_context() -> None:
    draft = Draft.of([5, 6, 7], [-1, -1, 1], [0, 0, 0])
    step = verify_known(draft, [6], [1, 2], lambda tokens: int_array([len(tokens), tokens[-1], tokens[-2]]))
    assert step.topk is not None
    assert step.topk.tolist() == [[2, 2, 1], [3, 5, 2], [3, 6, 2], [4, 7, 6]]


def test_a_proposer_that_requires_top_ids_is_not_replayed_without_them() -> None:
    class ReadsTopIds(Echo):
        requires = Requires(topk=4)

    with pytest.raises(AssertionError, match="topk"):
        replay(ReadsTopIds(), [1], [2, 3], budget=4)


def test_bucket_counts_are_of_nodes_whose_parent_was_accepted() -> None:
    # 5 is accepted and 6 is not; of the children of 5, 7 is accepted and 8 is not; 9 is a child of the rejected 6 and
    # does not count.
    draft = Draft.of([5, 6, 7, 8, 9], [-1, -1, 0, 0, 1], [0, 0, 1, 1, 2])

    class Fixed(Echo):
        def propose(self, seq: int, budget: int) -> Draft:
            return draft

    result = replay(Fixed(), [1], [5, 7, 3], budget=5)
    assert result.bucket_counts(3).tolist() == [[2, 1], [2, 1], [0, 0]]


def test_toy_logits_depend_on_the_last_tokens_only() -> None:
    target = ToyTarget(vocab=32, seed=1, order=3)
    assert np.array_equal(target.logits([9, 9, 1, 2, 3]), target.logits([1, 2, 3]))
    assert not np.array_equal(target.logits([1, 2, 3]), target.logits([1, 2, 4]))
    assert not np.array_equal(target.logits([1, 2, 3]), ToyTarget(vocab=32, seed=2, order=3).logits([1, 2, 3]))
    assert target.logits([1, 2, 3]).dtype == np.float32
    assert target.logits([1, 2, 3]).shape == (32,)


def test_toy_text_branches_among_a_few_successors() -> None:
    target = ToyTarget(vocab=32, seed=1, order=3, branches=3)
    likely = {tuple(np.flatnonzero(target.logits([a, b, 5]) >= 4.0)) for a in range(8) for b in range(8)}
    assert len(likely) == 1
    assert len(next(iter(likely))) == 3
    firsts = {int(np.argmax(target.logits([a, b, 5]))) for a in range(8) for b in range(8)}
    assert firsts == set(next(iter(likely)))


def test_toy_greedy_takes_the_likeliest_token_and_topk_lists_them() -> None:
    target = ToyTarget(vocab=32, seed=1)
    text = target.greedy([4, 5], 12)
    context = [4, 5]
    for token in text:
        logits = target.logits(context)
        ranked = sorted(range(32), key=lambda v: -logits[v])
        assert token == ranked[0]
        assert target.topk(context, 8).tolist() == ranked[:8]
        context.append(token)
    assert target.greedy([4, 5], 0) == []


def test_the_toy_target_is_the_same_in_every_process() -> None:
    # The text cannot be worked out by hand; but it must not depend on the hash seed of the process.
    code = "from specplug.testing import ToyTarget; print(ToyTarget().greedy([1, 2], 8))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": salt}, capture_output=True, text=True, check=True
        ).stdout
        for salt in ("1", "2")
    }
    assert outputs == {f"{ToyTarget().greedy([1, 2], 8)}\n"}
