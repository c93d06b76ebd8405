"""The contract of a proposer as tests, which are plain functions and asserts. It depends on no test runner."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from specplug.core import EMPTY, BatchProposer, Draft, IntArray, Proposer, Step, int_array
from specplug.testing.known_text import TopK, replay, verify_known
from specplug.testing.proposer_state import has_shared_state, private_state, shared_state
from specplug.testing.toy_target import ToyTarget


class ProposerContract:
    """The contract of a proposer, as tests. Subclass it, define `make`, and let pytest collect the subclass."""

    vocab = 64
    num_sequences_to_fill = 40
    """Number of finished sequences, of 12 + 48 tokens each, that fill the bounded state of `make_bounded`."""

    def make(self) -> Proposer:
        """A fresh proposer, equal in every call."""
        raise NotImplementedError

    def make_bounded(self) -> Proposer:
        """A fresh proposer whose `shared_*` state, if it has any, has a bound small enough to be reached in a test."""
        return self.make()

    def target(self) -> ToyTarget:
        """The target whose text the proposer is tested on; its ids are below `vocab`."""
        return ToyTarget(self.vocab, seed=7)

    def test_buckets_are_named_once_with_a_probability(self) -> None:
        buckets = self.make().buckets
        names = [bucket.name for bucket in buckets]
        assert len(set(names)) == len(names), f"two buckets have the same name: {names}"
        for bucket in buckets:
            assert 0.0 <= bucket.prior <= 1.0, (
                f"the prior of bucket {bucket.name!r} is {bucket.prior}, which is no probability"
            )

    def test_drafts_are_well_formed_and_within_budget(self) -> None:
        proposer = self.make()
        for _, step in self._run(proposer, seq=0, budget=16):
            del step
            for budget in (0, 1, 2, 7, 64):
                self._check(proposer, proposer.propose(0, budget), budget)

    def test_shortest_prompts(self) -> None:
        for prompt in ([], [3]):
            proposer = self.make()
            proposer.begin(0, int_array(prompt))
            self._check(proposer, proposer.propose(0, 7), 7)
            proposer.observe(0, self._step(proposer, EMPTY, [5], prompt))
            self._check(proposer, proposer.propose(0, 7), 7)
            proposer.end(0)

    def test_same_inputs_give_the_same_drafts(self) -> None:
        one = [draft for draft, _ in self._run(self.make(), seq=0, budget=16)]
        two = [draft for draft, _ in self._run(self.make(), seq=0, budget=16)]
        _assert_same(one, two, "two fresh proposers return different drafts")

    def test_propose_changes_nothing_visible(self) -> None:
        quiet, asked = self.make(), self.make()
        expected = [draft for draft, _ in self._run(quiet, seq=0, budget=16)]
        drafts = []
        for draft, _ in self._run(asked, seq=0, budget=16):
            drafts.append(draft)
            again = [asked.propose(0, budget) for budget in (64, 0, 5, 64)]
            _assert_same(again[:1], again[3:], "a second call of propose returned another draft")
        _assert_same(expected, drafts, "extra calls of propose changed later drafts")

    def test_prompt_and_step_stay_as_they_were(self) -> None:
        proposer = self.make()
        prompt = self.target().prompt(24)
        before = prompt.copy()
        proposer.begin(0, prompt)
        draft = proposer.propose(0, 16)
        continuation = self.target().greedy(prompt.tolist(), 17)
        step = self._step(proposer, draft, continuation, prompt.tolist())
        kept = pickle.dumps((step.emitted, step.accepted, *_arrays(step.draft), step.topk))
        proposer.observe(0, step)
        assert np.array_equal(prompt, before), "begin changed the prompt"
        after = pickle.dumps((step.emitted, step.accepted, *_arrays(step.draft), step.topk))
        assert after == kept, "observe changed its Step"

    def test_later_changes_to_the_prompt_do_not_matter(self) -> None:
        proposer, expected = self.make(), self.make()
        prompt = self.target().prompt(24)
        expected.begin(0, prompt.copy())
        proposer.begin(0, prompt)
        prompt[:] = 0
        _assert_same(
            [expected.propose(0, 16)], [proposer.propose(0, 16)], "begin kept the prompt itself instead of a copy"
        )

    def test_a_batch_gets_the_drafts_of_its_sequences(self) -> None:
        """Only for proposers with `propose_batch`: it returns what `propose` returns for each sequence."""
        proposer = self.make()
        if not isinstance(proposer, BatchProposer):
            return
        runs = {key: self._run(proposer, seq=key, budget=16) for key in (3, 0, 5)}
        for budgets in ((0, 1, 16), (7, 7, 7), (64, 2, 0), (16, 16, 16)):
            for run in runs.values():
                next(run, None)
            expected = [proposer.propose(seq, budget) for seq, budget in zip(runs, budgets, strict=True)]
            drafts = proposer.propose_batch(list(runs), list(budgets))
            _assert_same(expected, drafts, "propose_batch does not return the drafts of propose")
            _assert_same(
                expected, proposer.propose_batch(list(runs), list(budgets)), "propose_batch changed the drafts"
            )
        assert proposer.propose_batch([], []) == [], "propose_batch of no sequences must return no drafts"

    def test_sequences_do_not_mix(self) -> None:
        """Interleaved sequences get the drafts that they get alone; with shared state, those of a second such run."""
        keys = (0, 1, 2)
        together = self._interleaved(self.make(), keys)
        if has_shared_state(self.make()):
            expected = self._interleaved(self.make(), keys)
        else:
            expected = {key: [draft for draft, _ in self._run(self.make(), seq=key, budget=16)] for key in keys}
        for key in keys:
            _assert_same(expected[key], together[key], f"sequence {key} gets other drafts while other sequences run")

    def test_end_forgets_the_sequence(self) -> None:
        proposer = self.make()
        self._finish(proposer, seq=0)
        before = len(pickle.dumps(private_state(proposer)))
        for seq in range(1, 21):
            self._finish(proposer, seq=seq)
        growth = len(pickle.dumps(private_state(proposer))) - before
        # A counter may grow by a byte; twenty sequences that are not forgotten take hundreds.
        assert growth <= 64, f"20 ended sequences left {growth} bytes outside attributes named shared_*"

    def test_a_sequence_number_can_be_used_again(self) -> None:
        proposer = self.make()
        first = [draft for draft, _ in self._run(proposer, seq=0, budget=16)]
        proposer.end(0)
        second = [draft for draft, _ in self._run(proposer, seq=0, budget=16)]
        if not has_shared_state(proposer):
            _assert_same(first, second, "the ended sequence changes the drafts of the next one with its number")

    def test_shared_state_is_bounded(self) -> None:
        proposer = self.make_bounded()
        sizes = []
        for seq in range(4 * self.num_sequences_to_fill):
            self._finish(proposer, seq=seq)
            if (seq + 1) % self.num_sequences_to_fill == 0:
                sizes.append(len(pickle.dumps(shared_state(proposer))))
        assert max(sizes) <= 1.25 * sizes[0] + 256, f"the state in shared_* attributes keeps growing (bytes): {sizes}"

    def test_unknown_sequences_are_refused(self) -> None:
        proposer = self.make()
        step = self._step(proposer, EMPTY, [1], [1])
        calls: dict[str, Callable[[], object]] = {
            "propose": lambda: proposer.propose(9, 4),
            "observe": lambda: proposer.observe(9, step),
            "end": lambda: proposer.end(9),
        }
        for when in ("never begun", "ended"):
            for name, call in calls.items():
                assert _raises_key_error(call), f"{name} of a sequence that was {when} must raise KeyError"
            proposer.begin(9, int_array([1, 2, 3]))
            proposer.end(9)

    def test_any_draft_may_have_been_verified(self) -> None:
        """The planner may have verified a subtree of the draft, nothing, or the draft of another proposer."""
        target, proposer = self.target(), self.make()
        context = target.prompt(24).tolist()
        proposer.begin(0, int_array(context))
        for round_number in range(24):
            own = proposer.propose(0, 12)
            continuation = target.greedy(context, 4)
            first, second = continuation[:2]
            foreign = Draft.of([first, (first + 1) % self.vocab, second], [-1, -1, 0], [0, 0, 0])
            step = self._step(
                proposer, (own.select(range(len(own) // 2)), EMPTY, foreign)[round_number % 3], continuation, context
            )
            proposer.observe(0, step)
            context += step.emitted
            self._check(proposer, proposer.propose(0, 12), 12)
        proposer.end(0)

    def test_a_step_may_lack_top_ids_and_name_buckets_of_a_fusion(self) -> None:
        """While a proposer is not asked, its Steps have no top ids, or as many as those that are asked require."""
        target, proposer = self.target(), self.make()
        context = target.prompt(24).tolist()
        proposer.begin(0, int_array(context))
        for round_number in range(24):
            own = proposer.propose(0, 12)
            fused = Draft(own.tokens, own.parents, own.buckets + np.int32(1000))
            step = self._step(proposer, fused, target.greedy(context, 4), context)
            topk = (
                step.topk if step.topk is None or round_number % 3 == 2 else (None, step.topk[:, :1])[round_number % 3]
            )
            proposer.observe(0, Step(step.emitted, step.draft, step.accepted, topk))
            context += step.emitted
            self._check(proposer, proposer.propose(0, 12), 12)
        proposer.end(0)

    def test_generation_may_stop_inside_the_accepted_path(self) -> None:
        target, proposer = self.target(), self.make()
        context = target.prompt(24).tolist()
        proposer.begin(0, int_array(context))
        continuation = target.greedy(context, 3)
        draft = Draft.chain(continuation, [0, 0, 0])
        full = self._step(proposer, draft, continuation, context)
        assert len(full.accepted) == 3
        proposer.observe(0, Step(full.emitted[:2], draft, full.accepted, full.topk))
        self._check(proposer, proposer.propose(0, 12), 12)
        proposer.end(0)

    def test_text_is_the_targets(self) -> None:
        target = self.target()
        prompt = target.prompt(24)
        expected = target.greedy(prompt.tolist(), 96)
        result = replay(self.make(), prompt, expected, 16, self._topk(self.make()))
        assert result.emitted == expected, "the replay emitted a text that is not the target's"
        assert result.mean_acceptance_length >= 1.0

    def _topk(self, proposer: Proposer) -> TopK | None:
        target, k = self.target(), proposer.requires.topk
        return (lambda tokens: target.topk(tokens, k)) if k else None

    def _step(self, proposer: Proposer, draft: Draft, continuation: Sequence[int], context: Sequence[int]) -> Step:
        return verify_known(draft, continuation, context, self._topk(proposer))

    def _run(self, proposer: Proposer, seq: int, budget: int, n: int = 48) -> Iterator[tuple[Draft, Step]]:
        """Begin a sequence, whose prompt depends on `seq`, and decode n tokens; yields each draft and Step."""
        target = self.target()
        context = target.prompt(12, key=seq).tolist()
        continuation = target.greedy(context, n)
        proposer.begin(seq, int_array(context))
        while continuation:
            draft = proposer.propose(seq, budget)
            step = self._step(proposer, draft, continuation, context)
            yield draft, step
            proposer.observe(seq, step)
            context += step.emitted
            continuation = continuation[len(step.emitted) :]

    def _finish(self, proposer: Proposer, seq: int) -> None:
        for _ in self._run(proposer, seq, budget=8):
            pass
        proposer.end(seq)

    def _interleaved(self, proposer: Proposer, keys: Sequence[int]) -> dict[int, list[Draft]]:
        runs = {key: self._run(proposer, seq=key, budget=16) for key in keys}
        drafts: dict[int, list[Draft]] = {key: [] for key in keys}
        while runs:
            for key, run in list(runs.items()):
                pair = next(run, None)
                if pair is None:
                    del runs[key]
                else:
                    drafts[key].append(pair[0])
        return drafts

    def _check(self, proposer: Proposer, draft: Draft, budget: int) -> None:
        draft.check(num_tokens=self.vocab, num_buckets=len(proposer.buckets))
        assert len(draft) <= budget, f"the draft has {len(draft)} nodes; the budget was {budget}"


def _assert_same(one: Sequence[Draft], two: Sequence[Draft], complaint: str) -> None:
    assert len(one) == len(two), f"{complaint}: {len(one)} and {len(two)} drafts"
    for index, (a, b) in enumerate(zip(one, two, strict=True)):
        same = all(np.array_equal(x, y) for x, y in zip(_arrays(a), _arrays(b), strict=True))
        assert same, f"{complaint}; the first difference is at step {index}: {_arrays(a)} and {_arrays(b)}"


def _arrays(draft: Draft) -> tuple[IntArray, IntArray, IntArray]:
    return draft.tokens, draft.parents, draft.buckets


def _raises_key_error(call: Callable[[], object]) -> bool:
    try:
        call()
    except KeyError:
        return True
    return False
