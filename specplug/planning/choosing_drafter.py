"""Drafts with one of several drafters of the same text, such as the exits of a model, and changes it while it drafts.

Each of them keeps up with the text, and one drafts at a time, for all sequences. Depends on the contracts of proposers
and on `ExitChoice`, not on an engine or on what the drafters are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from specplug.core import EMPTY, Bucket, ChoiceAdvice, Draft, DraftAdvice, IntArray, Requires, Step
from specplug.drafts.chains import num_agreeing
from specplug.drafts.confidence import exit_buckets
from specplug.planning.exit_choice import ExitChoice


class Exit(Protocol):
    """A model-based proposer that drafts for several sequences in one pass."""

    buckets: tuple[Bucket, ...]
    passes: int
    advice: DraftAdvice | None

    def begin(self, seq: int, prompt: IntArray) -> None: ...

    def propose_batch(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[Draft]: ...

    def observe(self, seq: int, step: Step) -> None: ...

    def end(self, seq: int) -> None: ...

    @property
    def retry_ms(self) -> float: ...

    def pass_ms(self, rows: int) -> float: ...

    def reading_ms(self, seq: int) -> float: ...

    def read(self, seqs: Sequence[int], ms: float) -> None: ...

    def score(self, seq: int) -> tuple[int, int]: ...

    def time_pass(self) -> None: ...


AnyExit = TypeVar("AnyExit", bound=Exit)

NEVER_MS = 1e9
"""Price of a draft token while no exit would save time, so that none is drafted."""


class ChoosingDrafter(Generic[AnyExit]):
    """Drafts with one of several exits of the target, or with none.

    Source: DEL (arXiv 2504.05598), with measured milliseconds in place of layers.
    An exit that does not draft is scored by whoever calls `learn_shadow`, or now and then by a pass over recent tokens
    while nothing is drafted.
    State: that of each exit's drafter; four numbers per exit.
    Requires: nothing of the target.
    Cost per draft token: a pass of the current exit over one row for each sequence.
    """

    requires = Requires()

    def __init__(
        self,
        exits: Sequence[int],
        drafters: Sequence[AnyExit],
        *,
        total: int,
        likeliest: int | None = None,
        by_layers: bool = False,
    ) -> None:
        """
        exits      layers of each drafter, ascending
        total      layers of the target
        likeliest  how many of the buckets of an exit, from the first one on, belong to its likeliest tokens, and not to
                   runners-up. None for all
        by_layers  follow the paper: choose the exit by tokens per layer, draft up to its threshold, never stop drafting
        """
        self.exits = tuple(exits)
        self.drafters = tuple(drafters)
        self.buckets = exit_buckets(exits, drafters[0].buckets)
        self.choice = ExitChoice(len(exits))
        self._total = total
        self._likeliest = len(self.drafters[0].buckets) if likeliest is None else likeliest
        self._by_layers = by_layers
        self.advice: DraftAdvice | None = None
        """Tells which exit to use, and how far to draft."""
        self._lengths: dict[int, int] = {}
        """Tokens of each running sequence."""
        self._chains: dict[int, tuple[int, list[int], list[int]]] = {}
        """The exit that drafted for a sequence in this step, its draft tokens and their buckets, without runners-up."""
        self.scored_beside = False
        """Whether somebody calls `learn_shadow`, so that no exit has to be tried."""
        self._next_trial = 0
        self._hopeful = [True] * len(exits)
        """For each exit, whether it might save time by what was known at the last choice."""
        self._choice_due = False
        """Whether something was learned since the last choice. The choice is made once, in the next step."""
        for index, drafter in enumerate(self.drafters):
            drafter.advice = _OneExit(self, index)

    @property
    def current(self) -> int | None:
        """The layers of the exit that drafts; None where plain decoding is expected to be fastest."""
        return None if self.choice.current is None else self.exits[self.choice.current]

    @property
    def passes(self) -> int:
        return sum(drafter.passes for drafter in self.drafters)

    def start_afresh(self) -> None:
        """Forget what was learned of the exits."""
        self.choice = ExitChoice(len(self.exits))
        self.advice = None
        self._lengths.clear()
        self._chains.clear()
        self._choice_due = False
        self._hopeful = [True] * len(self.exits)
        for index, drafter in enumerate(self.drafters):
            drafter.advice = _OneExit(self, index)

    # -- the contract of a proposer -------------------------------------------------------------------------------

    def begin(self, seq: int, prompt: IntArray) -> None:
        for drafter in self.drafters:
            drafter.begin(seq, prompt)
        self._lengths[seq] = len(prompt)

    def propose(self, seq: int, budget: int) -> Draft:
        return self.propose_batch([seq], [budget])[0]

    def propose_batch(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[Draft]:
        index = self._chosen()
        if index is None:
            for seq in seqs:
                self._lengths[seq]  # raises for a sequence that does not run
            return [EMPTY] * len(seqs)
        drafter = self.drafters[index]
        first = len(drafter.buckets) * index
        found = []
        for seq, draft in zip(seqs, drafter.propose_batch(seqs, budgets), strict=True):
            chain = [node for node, bucket in enumerate(draft.buckets.tolist()) if bucket < self._likeliest]
            self._chains[seq] = index, draft.tokens[chain].tolist(), draft.buckets[chain].tolist()
            found.append(Draft(draft.tokens, draft.parents, draft.buckets + draft.buckets.dtype.type(first)))
        return found

    def observe(self, seq: int, step: Step) -> None:
        self._lengths[seq] += len(step.emitted)
        for drafter in self.drafters:
            drafter.observe(seq, step)
        index, tokens, buckets = self._chains.pop(seq, (0, [], []))
        if not tokens:
            if self.choice.current is None:  # then nothing else may ask for the choice
                self._chosen()
            return
        right = num_agreeing(tokens, step.emitted)
        tested = min(len(tokens), len(step.emitted), right + 1)
        confidence = [self.drafters[index].buckets[bucket].prior for bucket in buckets]
        self.choice.learn(index, confidence[:right], confidence[right:tested])
        self.choice.fade()
        self._choice_due = True

    def end(self, seq: int) -> None:
        for drafter in self.drafters:
            drafter.end(seq)
        del self._lengths[seq]
        self._chains.pop(seq, None)

    # -- the contract of a model-based proposer -------------------------------------------------------------------

    @property
    def retry_ms(self) -> float:
        index = self.choice.current
        return self.drafters[self._next_trial if index is None else index].retry_ms

    def pass_ms(self, rows: int) -> float:
        index = self._chosen()
        return NEVER_MS if index is None else self.drafters[index].pass_ms(rows)

    def reading_ms(self, seq: int) -> float:
        index = self._chosen()
        return 0.0 if index is None else self.drafters[index].reading_ms(seq)

    def read(self, seqs: Sequence[int], ms: float) -> None:
        index = self._chosen()
        if index is not None:
            self.drafters[index].read(seqs, ms)

    def score(self, seq: int) -> tuple[int, int]:
        index = self.choice.current
        return self._score(self._next_trial if index is None else index, seq)

    def time_pass(self) -> None:
        """With an exit chosen, time its pass; else score an exit on the longest text, in case it would pay now.

        Where nothing can be learned of any, what is known becomes less certain, until one is worth a trial.
        """
        if self.choice.current is not None:
            self.drafters[self.choice.current].time_pass()
            return
        trial, compared = self._trial(), 0
        if trial is not None and self._lengths:
            longest = max(self._lengths, key=self._lengths.__getitem__)
            _, compared = self._score(trial, longest)  # nothing of a sampled text
            self._next_trial = (trial + 1) % len(self.exits)
        if not compared:
            self.choice.age()
            self._choice_due = True

    # -- the choice -----------------------------------------------------------------------------------------------

    def learn_shadow(self, index: int, right: Sequence[float], wrong: Sequence[float]) -> None:
        """Count tokens that an exit would have drafted; `choose` follows when all exits were counted.

        An exit that has drafted in this step learns from its drafts.
        """
        if all(exit_ != index or not tokens for exit_, tokens, _ in self._chains.values()):
            self.choice.learn(index, right, wrong)

    def _chosen(self) -> int | None:
        """The exit of this step, by index."""
        if self._choice_due:
            self.choose()
        return self.choice.current

    def choose(self) -> bool:
        """Choose the exit for the next step; returns whether any may save time."""
        self._choice_due = False
        advice, before = self.advice, self.choice.current
        if not isinstance(advice, ChoiceAdvice):
            return True
        if self._by_layers:
            self.choice.choose_by_layers(self.exits, self._total)
        else:
            rows = max(len(self._lengths), 1)
            draft_ms = [drafter.pass_ms(rows) for drafter in self.drafters]
            change_ms = [sum(map(drafter.reading_ms, self._lengths)) for drafter in self.drafters]
            self.choice.choose(advice.saved_ms, draft_ms, change_ms)
            hoped = map(self.choice.hopeful_rate, range(len(self.exits)))
            self._hopeful = [advice.saved_ms(rate, ms) > 0 for rate, ms in zip(hoped, draft_ms, strict=True)]
        now = self.choice.current
        if now is not None and now != before:
            advice.expect(self.choice.rate(now))
        return any(self._hopeful)

    def another_pays(self, index: int, seq: int, chain: Sequence[int], rows: int) -> bool:
        """Whether an exit should draft one more token after a chain with these buckets of its own."""
        if self._by_layers:
            return self.drafters[index].buckets[chain[-1]].prior >= self.choice.threshold(index)
        if self.advice is None:
            return True
        first = len(self.drafters[index].buckets) * index
        return self.advice.another_pays(seq, [first + bucket for bucket in chain], rows)

    def learn(self, seq: int, right: int, tested: int) -> None:
        if self.advice is not None:
            self.advice.learn(seq, right, tested)

    def _trial(self) -> int | None:
        """The next exit to try of those that might save time; None where there is none, or no trial is needed."""
        if self.scored_beside:
            return None
        turn = (*range(self._next_trial, len(self.exits)), *range(self._next_trial))
        return next((exit_ for exit_ in turn if self._hopeful[exit_]), None)

    def _score(self, index: int, seq: int) -> tuple[int, int]:
        right, compared = self.drafters[index].score(seq)
        if compared:
            rate = right / compared
            self.choice.learn(index, [rate] * right, [rate] * (compared - right))
            self._choice_due = True
        return right, compared


class _OneExit:
    """The advice for the drafter of one exit."""

    def __init__(self, drafter: ChoosingDrafter[AnyExit], index: int) -> None:
        self._drafter = drafter
        self._index = index

    def another_pays(self, seq: int, chain: Sequence[int], rows: int) -> bool:
        return self._drafter.another_pays(self._index, seq, chain, rows)

    def reading_pays(self, seq: int, price_ms: float) -> bool:
        return self._drafter.advice is None or self._drafter.advice.reading_pays(seq, price_ms)

    def learn(self, seq: int, right: int, tested: int) -> None:
        self._drafter.learn(seq, right, tested)
