"""Contract tests for proposers, a toy target, and greedy replay of a known text. This module is for third parties, too.

To test a proposer of your own, subclass `ProposerContract`; pytest collects the tests that it inherits:

    class TestMine(ProposerContract):
        def make(self):
            return Mine()

The contract is that of `specplug.core.Proposer`. The tests are plain functions and asserts; this module depends on no
engine, no model and no test runner.
Source: the tree walk is greedy tree verification (SpecInfer, arXiv 2305.09781); the toy target is our own.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import EMPTY, ROOT, BatchProposer, Draft, IntArray, Proposer, Step, int_array
from specplug.verification.reference import verify_tree

TopK = Callable[[Sequence[int]], IntArray]
"""Returns the target's most likely next ids (int32[k], most likely first) after a context."""


class ToyTarget:
    """A tiny deterministic language model: its logits are a function of the last `order` tokens.

    Each token has `branches` plausible successors, which the seed fixes; the tokens before it decide their order. So
    the text repeats its bigrams, branches after them, and is determined by `order` tokens of context: proposers of
    every kind find something to draft.
    """

    def __init__(self, vocab: int = 64, seed: int = 0, *, order: int = 3, branches: int = 3) -> None:
        assert vocab > branches >= 1 and order >= 1
        self.vocab = vocab
        self.seed = seed
        self.order = order
        self.branches = branches

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32[vocab]: logits of the token after `tokens`: noise in [0, 1), plausible successors at 4 or more."""
        last = int(tokens[-1]) if len(tokens) else -1
        ids = np.arange(self.vocab, dtype=np.uint64)
        logits = (_mix(ids + np.uint64(_hash(self.seed, last))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        shift = _hash(self.seed, *(int(token) for token in tokens[-self.order :]))
        for rank, token in enumerate(self._successors(last)):
            logits[token] = 4.0 + 2.0 * ((rank + shift) % self.branches)
        return logits.astype(np.float32)

    def topk(self, tokens: Sequence[int], k: int) -> IntArray:
        """int32[k]: the most likely next ids, most likely first; of equally likely ones the lower id first."""
        return int_array(np.argsort(-self.logits(tokens), kind="stable")[:k].astype(np.int32))

    def greedy(self, prompt: Sequence[int], n: int) -> list[int]:
        """The n tokens that plain greedy decoding emits after `prompt`."""
        tokens = [int(token) for token in prompt]
        for _ in range(n):
            tokens.append(int(np.argmax(self.logits(tokens))))
        return tokens[len(tokens) - n :]

    def prompt(self, n: int, key: int = 0) -> IntArray:
        """int32[n]: a prompt of n tokens, which depends on the seed and `key` alone."""
        return int_array([_hash(self.seed, -2, key, i) % self.vocab for i in range(n)])

    def _successors(self, last: int) -> list[int]:
        start = _hash(self.seed, last, -3)
        stride = 1 + _hash(self.seed, last, -4) % ((self.vocab - 1) // self.branches)
        return [(start + j * stride) % self.vocab for j in range(self.branches)]


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The steps of a replay, and the text that they emitted."""

    steps: list[Step]
    emitted: list[int]

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target pass, including the target's own token: plain decoding is 1.00."""
        return len(self.emitted) / len(self.steps) if self.steps else 0.0

    def bucket_counts(self, num_buckets: int) -> npt.NDArray[np.int64]:
        """int64[num_buckets, 2]: the number of nodes whose parent was accepted, and of those that were accepted too."""
        counts = np.zeros((num_buckets, 2), dtype=np.int64)
        for step in self.steps:
            reached = {ROOT, *step.accepted}
            for node, (parent, bucket) in enumerate(
                zip(step.draft.parents.tolist(), step.draft.buckets.tolist(), strict=True)
            ):
                if parent in reached:
                    counts[bucket] += (1, node in reached)
        return counts


def replay(
    proposer: Proposer,
    prompt: Sequence[int] | IntArray,
    continuation: Sequence[int],
    budget: int,
    topk: TopK | None = None,
    *,
    seq: int = 0,
) -> ReplayResult:
    """Drive `proposer` from `begin` to `end`, as an engine would, over a text that the target is known to emit.

    prompt        the tokens before the text; the last one is the first root
    continuation  the text
    budget        most nodes per draft
    topk          for a proposer that requires top ids, as `lambda tokens: target.topk(tokens, 8)`
    """
    assert topk is not None or proposer.requires.topk == 0, "this proposer requires the target's top ids: pass `topk`"
    context = [int(token) for token in prompt]
    proposer.begin(seq, int_array(context))
    steps: list[Step] = []
    emitted: list[int] = []
    while len(emitted) < len(continuation):
        draft = proposer.propose(seq, budget)
        step = verify_known(draft, continuation[len(emitted) :], context, topk)
        context += step.emitted
        proposer.observe(seq, step)
        steps.append(step)
        # After `observe`, so that a proposer which writes into its Step changes the text and is found.
        emitted += step.emitted
    proposer.end(seq)
    return ReplayResult(steps, emitted)


def verify_known(
    draft: Draft, continuation: Sequence[int], context: Sequence[int] = (), topk: TopK | None = None
) -> Step:
    """The Step of verifying `draft`, if the target is known to emit `continuation` (n >= 1) after `context`."""
    known = iter([*(int(token) for token in continuation), _PAST_THE_END])
    emitted, accepted = verify_tree(draft, lambda _: next(known))
    if emitted[-1] == _PAST_THE_END:
        emitted.pop()
    return Step(emitted, draft, accepted, None if topk is None else _topk_rows(draft, context, topk))


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
        if _has_shared(self.make()):
            expected = self._interleaved(self.make(), keys)
        else:
            expected = {key: [draft for draft, _ in self._run(self.make(), seq=key, budget=16)] for key in keys}
        for key in keys:
            _assert_same(expected[key], together[key], f"sequence {key} gets other drafts while other sequences run")

    def test_end_forgets_the_sequence(self) -> None:
        proposer = self.make()
        self._finish(proposer, seq=0)
        before = len(pickle.dumps(_private(proposer)))
        for seq in range(1, 21):
            self._finish(proposer, seq=seq)
        growth = len(pickle.dumps(_private(proposer))) - before
        # A counter may grow by a byte; twenty sequences that are not forgotten take hundreds.
        assert growth <= 64, f"20 ended sequences left {growth} bytes outside attributes named shared_*"

    def test_a_sequence_number_can_be_used_again(self) -> None:
        proposer = self.make()
        first = [draft for draft, _ in self._run(proposer, seq=0, budget=16)]
        proposer.end(0)
        second = [draft for draft, _ in self._run(proposer, seq=0, budget=16)]
        if not _has_shared(proposer):
            _assert_same(first, second, "the ended sequence changes the drafts of the next one with its number")

    def test_shared_state_is_bounded(self) -> None:
        proposer = self.make_bounded()
        sizes = []
        for seq in range(4 * self.num_sequences_to_fill):
            self._finish(proposer, seq=seq)
            if (seq + 1) % self.num_sequences_to_fill == 0:
                sizes.append(len(pickle.dumps(_shared(proposer))))
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


_PAST_THE_END = -1
"""Stands for the target's next token after the end of the known text; no draft token equals it."""


def _topk_rows(draft: Draft, context: Sequence[int], topk: TopK) -> IntArray:
    paths: list[list[int]] = [list(context)]
    for parent, token in zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True):
        paths.append([*paths[parent + 1], token])
    return int_array(np.stack([topk(path) for path in paths]))


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


def _private(proposer: Proposer) -> Any:
    """All state of a proposer outside attributes named `shared_*`, as plain containers."""
    return _plain(proposer, keep=lambda name: not name.startswith("shared_"), seen=set())


def _shared(proposer: Proposer) -> list[Any]:
    """The state in attributes named `shared_*`, at any depth: each proposer of a fusion has its own."""
    found: list[Any] = []

    def note(owner: Any) -> None:
        for name, value in _attributes(owner):
            if name.startswith("shared_"):
                found.append(_plain(value, keep=lambda _: True, seen=set()))

    _plain(proposer, keep=lambda name: not name.startswith("shared_"), seen=set(), visit=note)
    return found


def _has_shared(proposer: Proposer) -> bool:
    return bool(_shared(proposer))


def _plain(
    value: Any, keep: Callable[[str], bool], seen: set[int], visit: Callable[[Any], None] = lambda _: None
) -> Any:
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if id(value) in seen:
        return "seen"
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return [(_plain(k, keep, seen, visit), _plain(v, keep, seen, visit)) for k, v in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [_plain(item, keep, seen, visit) for item in value]
    if isinstance(value, type) or callable(value):
        return getattr(value, "__qualname__", "callable")
    if hasattr(value, "tobytes"):
        return value.tobytes()
    visit(value)
    return [(name, _plain(held, keep, seen, visit)) for name, held in _attributes(value) if keep(name)]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    names = dict.fromkeys(getattr(value, "__dict__", {}))
    for owner in type(value).__mro__:
        slots = owner.__dict__.get("__slots__", ())
        names.update(dict.fromkeys((slots,) if isinstance(slots, str) else slots))
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


_MASK = (1 << 64) - 1


def _hash(*values: int) -> int:
    """A 64-bit hash that is the same in every process: the finaliser of SplitMix64, chained."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 for an array of 64-bit integers, which wrap around."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
