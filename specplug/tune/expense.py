"""What speculation costs beside target passes, as lines through timed calls; and the clock that counts by them.

Knows microseconds per call, per node and per row. Knows no engine and no model.
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
        """The line through the medians of (n, microseconds), neither part below 0."""
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
    """Beside the target's own time. By method: `ask` per guessed node, `tell` per emitted token.

    Where one plan serves a batch, `ask` and `plan` are per sequence.

    plan    choosing, laying out and learning, per guessed node; `idle` where a method was asked and guessed nothing
    topk    reading top ids, per row
    step    the loop itself, plain decoding's too, per row
    """

    ask: Mapping[str, Line] = field(default_factory=dict)
    tell: Mapping[str, Line] = field(default_factory=dict)
    plan: Line = Line()
    idle: Line = Line()
    topk: Line = Line()
    step: Line = Line()

    def as_mapping(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Expense:
        lines = {name: Line(**data[name]) for name in ("plan", "idle", "topk", "step")}
        ask, tell = ({method: Line(**line) for method, line in data[name].items()} for name in ("ask", "tell"))
        return cls(ask=ask, tell=tell, **lines)


class Clock(Protocol):
    """Nanoseconds; `pay` tells it of time that was only counted."""

    def __call__(self) -> int: ...

    def pay(self, ns: int) -> None: ...


class CountedClock:
    """Time passes only when somebody pays."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def pay(self, ns: int) -> None:
        self.now += ns


class RealClock:
    """The machine's time and what is paid; time paid back was somebody else's."""

    def __init__(self) -> None:
        self._paid = 0

    def __call__(self) -> int:
        return perf_counter_ns() + self._paid

    def pay(self, ns: int) -> None:
        self._paid += ns


class _Around(Generic[T]):
    """What a wrapped source leaves as it is."""

    def __init__(self, source: T) -> None:
        self.source: T = source
        self.requires = source.requires
        self.buckets = source.buckets
        self.begin = source.begin
        self.end = source.end


class Priced(_Around[Proposer]):
    """A proposer whose calls take, on a counted clock, what they were measured to take."""

    def __init__(self, source: Proposer, clock: Clock, expense: Expense, method: str, sources: int) -> None:
        """`sources` is how many share the cost of planning."""
        super().__init__(source)
        self._clock = clock
        self._ask = expense.ask.get(method, Line())
        self._tell = expense.tell.get(method, Line())
        self._plan = Line(expense.plan.base / sources, expense.plan.per)
        self._idle = Line(expense.idle.base / sources)

    def propose(self, seq: int, budget: int) -> Draft:
        draft = self.source.propose(seq, budget)
        n = len(draft)
        self._clock.pay(self._ask.ns(n) + (self._plan if n else self._idle).ns(n))
        return draft

    def observe(self, seq: int, step: Step) -> None:
        self.source.observe(seq, step)
        self._clock.pay(self._tell.ns(len(step.emitted)))


class PricedChains(_Around[ChainProposer]):
    """The same for many sequences at once."""

    def __init__(self, source: ChainProposer, clock: Clock, expense: Expense, method: str, sources: int) -> None:
        super().__init__(source)
        self._clock = clock
        self._ask = expense.ask.get(method, Line())
        self._tell = expense.tell.get(method, Line())
        self._plan = Line(expense.plan.base / sources, expense.plan.per / sources)

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        chains = self.source.propose_chains(seqs, k)
        self._clock.pay(self._ask.ns(len(seqs)) + self._plan.ns(len(seqs)))
        return chains

    def observe_chains(self, steps: ChainSteps) -> None:
        self.source.observe_chains(steps)
        self._clock.pay(self._tell.ns(len(steps.after)))


class Timed(_Around[Proposer]):
    """A proposer whose calls are timed, asked for drafts of different sizes in turn."""

    def __init__(self, source: Proposer, sizes: Sequence[int], clock: Callable[[], int] = perf_counter_ns) -> None:
        super().__init__(source)
        self.asked: list[tuple[int, float]] = []
        self.told: list[tuple[int, float]] = []
        self._sizes = sizes
        self._clock = clock

    def propose(self, seq: int, budget: int) -> Draft:
        size = min(budget, self._sizes[len(self.asked) % len(self._sizes)])
        began = self._clock()
        draft = self.source.propose(seq, size)
        self.asked.append((len(draft), (self._clock() - began) / 1000))
        return draft

    def observe(self, seq: int, step: Step) -> None:
        began = self._clock()
        self.source.observe(seq, step)
        self.told.append((len(step.emitted), (self._clock() - began) / 1000))


class TimedChains(_Around[ChainProposer]):
    """A source of chains whose calls are timed: (sequences, us) of `asked`, (new tokens, us) of `told`.

    Their time is taken off `clock`, which so shows what goes on around them.
    """

    def __init__(self, source: ChainProposer, clock: Clock) -> None:
        super().__init__(source)
        self.asked: list[tuple[int, float]] = []
        self.told: list[tuple[int, float]] = []
        self._clock = clock

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        began = perf_counter_ns()
        chains = self.source.propose_chains(seqs, k)
        self.asked.append((len(seqs), self._taken(began)))
        return chains

    def observe_chains(self, steps: ChainSteps) -> None:
        began = perf_counter_ns()
        self.source.observe_chains(steps)
        self.told.append((len(steps.after), self._taken(began)))

    def _taken(self, began: int) -> float:
        taken = perf_counter_ns() - began
        self._clock.pay(-taken)
        return taken / 1000
