"""The cost of drafting beside the target's passes, as lines through timed calls; and clocks that count by these lines.

This module works in microseconds per call, per node and per row. It does not depend on an engine or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter_ns
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from specplug.core import Draft, Proposer, Step
from specplug.drafts.chains import ChainProposer, Chains, ChainSteps

T = TypeVar("T", Proposer, ChainProposer)


@dataclass(frozen=True, slots=True)
class Line:
    """`base + per * n`, microseconds."""

    base: float = 0.0
    per: float = 0.0

    def ns(self, n: int) -> int:
        return round((self.base + self.per * n) * 1000)

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> Line:
        """The line through the medians of (n, microseconds), with neither part below 0."""
        groups: dict[int, list[float]] = {}
        for n, us in points:
            groups.setdefault(n, []).append(us)
        if not groups:
            return cls()
        medians = {n: float(np.median(values)) for n, values in groups.items()}
        weights = {n: len(values) for n, values in groups.items()}
        total = sum(weights.values())
        mean_n = sum(n * weights[n] for n in medians) / total
        mean_us = max(0.0, sum(us * weights[n] for n, us in medians.items()) / total)
        spread = sum(weights[n] * (n - mean_n) ** 2 for n in medians)
        per = sum(weights[n] * (n - mean_n) * (us - mean_us) for n, us in medians.items()) / spread if spread else 0.0
        per = min(max(per, 0.0), mean_us / mean_n if mean_n else 0.0)
        return cls(round(mean_us - per * mean_n, 2), round(per, 3))


@dataclass(frozen=True, slots=True)
class Expense:
    """The cost of drafting beside the target's passes.

    propose  by method, of `propose`, per draft token
    observe  by method, of `observe`, per emitted token
    plan     choosing a draft, building the batch and learning, per draft token
    idle     the same in a step in which a method was asked and proposed nothing
    topk     reading top ids, per row
    step     the step loop itself, which plain decoding pays too, per row

    Where one plan serves a batch, `propose` and `plan` are per sequence.
    """

    propose: Mapping[str, Line] = field(default_factory=dict)
    observe: Mapping[str, Line] = field(default_factory=dict)
    plan: Line = Line()
    idle: Line = Line()
    topk: Line = Line()
    step: Line = Line()

    def as_mapping(self) -> dict[str, Any]:
        """Plain data, for journals and documents."""
        return {_KEYS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Expense:
        """The inverse of `as_mapping`."""
        lines = {name: Line(**data[name]) for name in ("plan", "idle", "topk", "step")}
        propose, observe = (
            {method: Line(**line) for method, line in data[_KEYS[name]].items()} for name in ("propose", "observe")
        )
        return cls(propose=propose, observe=observe, **lines)


_KEYS = {"propose": "ask", "observe": "tell"}
"""Names of fields in journals and documents, where they differ."""


class Clock(Protocol):
    """Nanoseconds. `advance` adds time that only counts as passed."""

    def __call__(self) -> int: ...

    def advance(self, ns: int) -> None: ...


class SimulatedClock:
    """A clock that only moves when it is advanced."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def advance(self, ns: int) -> None:
        self.now += ns


class RealClock:
    """The machine's clock plus the time by which it was advanced; a negative advance takes time off it."""

    def __init__(self) -> None:
        self._advanced = 0

    def __call__(self) -> int:
        return perf_counter_ns() + self._advanced

    def advance(self, ns: int) -> None:
        self._advanced += ns


class _Wrapper(Generic[T]):
    """The parts of a wrapped proposer that stay the same."""

    def __init__(self, proposer: T) -> None:
        self.proposer: T = proposer
        self.requires = proposer.requires
        self.buckets = proposer.buckets
        self.begin = proposer.begin
        self.end = proposer.end


class PricedProposer(_Wrapper[Proposer]):
    """A proposer whose calls advance a clock by the time that they were measured to take."""

    def __init__(self, proposer: Proposer, clock: Clock, expense: Expense, method: str, sharing: int) -> None:
        """`sharing` is the number of proposers that share the cost of planning."""
        super().__init__(proposer)
        self._clock = clock
        self._propose = expense.propose.get(method, Line())
        self._observe = expense.observe.get(method, Line())
        self._plan = Line(expense.plan.base / sharing, expense.plan.per)
        self._idle = Line(expense.idle.base / sharing)

    def propose(self, seq: int, budget: int) -> Draft:
        draft = self.proposer.propose(seq, budget)
        n = len(draft)
        self._clock.advance(self._propose.ns(n) + (self._plan if n else self._idle).ns(n))
        return draft

    def observe(self, seq: int, step: Step) -> None:
        self.proposer.observe(seq, step)
        self._clock.advance(self._observe.ns(len(step.emitted)))


class PricedChains(_Wrapper[ChainProposer]):
    """The same for chains of many sequences at once."""

    def __init__(self, proposer: ChainProposer, clock: Clock, expense: Expense, method: str, sharing: int) -> None:
        super().__init__(proposer)
        self._clock = clock
        self._propose = expense.propose.get(method, Line())
        self._observe = expense.observe.get(method, Line())
        self._plan = Line(expense.plan.base / sharing, expense.plan.per / sharing)

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        chains = self.proposer.propose_chains(seqs, k)
        self._clock.advance(self._propose.ns(len(seqs)) + self._plan.ns(len(seqs)))
        return chains

    def observe_chains(self, steps: ChainSteps) -> None:
        self.proposer.observe_chains(steps)
        self._clock.advance(self._observe.ns(len(steps.after)))


class TimedProposer(_Wrapper[Proposer]):
    """A proposer whose calls are timed, with budgets of different sizes in turn.

    proposed  (draft tokens, microseconds) of each `propose`
    observed  (emitted tokens, microseconds) of each `observe`
    """

    def __init__(self, proposer: Proposer, sizes: Sequence[int], clock: Callable[[], int] = perf_counter_ns) -> None:
        super().__init__(proposer)
        self.proposed: list[tuple[int, float]] = []
        self.observed: list[tuple[int, float]] = []
        self._sizes = sizes
        self._clock = clock

    def propose(self, seq: int, budget: int) -> Draft:
        size = min(budget, self._sizes[len(self.proposed) % len(self._sizes)])
        began = self._clock()
        draft = self.proposer.propose(seq, size)
        self.proposed.append((len(draft), (self._clock() - began) / 1000))
        return draft

    def observe(self, seq: int, step: Step) -> None:
        began = self._clock()
        self.proposer.observe(seq, step)
        self.observed.append((len(step.emitted), (self._clock() - began) / 1000))


class TimedChains(_Wrapper[ChainProposer]):
    """A proposer of chains whose calls are timed. Their time is taken off `clock`, so it shows everything else.

    proposed  (sequences, microseconds) of each `propose_chains`
    observed  (new tokens, microseconds) of each `observe_chains`
    """

    def __init__(self, proposer: ChainProposer, clock: Clock) -> None:
        super().__init__(proposer)
        self.proposed: list[tuple[int, float]] = []
        self.observed: list[tuple[int, float]] = []
        self._clock = clock

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        began = perf_counter_ns()
        chains = self.proposer.propose_chains(seqs, k)
        self.proposed.append((len(seqs), self._taken(began)))
        return chains

    def observe_chains(self, steps: ChainSteps) -> None:
        began = perf_counter_ns()
        self.proposer.observe_chains(steps)
        self.observed.append((len(steps.after), self._taken(began)))

    def _taken(self, began: int) -> float:
        taken = perf_counter_ns() - began
        self._clock.advance(-taken)
        return taken / 1000
