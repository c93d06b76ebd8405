"""What a replay is given, and what comes of it.

Knows sums, milliseconds and costs. Drives nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specplug.profile import CostPoints
from specplug.tune.expense import Expense

POSITIONS = 16
"""Draft positions whose acceptance is told apart."""


@dataclass(slots=True)
class Sums:
    """Over some answers; milliseconds."""

    tokens: int = 0
    ms: float = 0.0
    plain_ms: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    offered_at: list[int] = field(default_factory=lambda: [0] * POSITIONS)
    accepted_at: list[int] = field(default_factory=lambda: [0] * POSITIONS)

    def add(self, other: Sums) -> None:
        self.tokens += other.tokens
        self.ms += other.ms
        self.plain_ms += other.plain_ms
        self.steps += other.steps
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.offered_at = [a + b for a, b in zip(self.offered_at, other.offered_at, strict=True)]
        self.accepted_at = [a + b for a, b in zip(self.accepted_at, other.accepted_at, strict=True)]

    @property
    def speedup(self) -> float:
        return self.plain_ms / self.ms if self.ms else 1.0

    @property
    def mean_acceptance_length(self) -> float:
        return 1 + self.accepted / self.steps if self.steps else 1.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """One setting over one trace: per answer, in the trace's order, and what its buckets had learned at the end."""

    answers: tuple[Sums, ...]
    categories: tuple[str, ...]
    learned: Mapping[str, tuple[float, float]]

    @property
    def total(self) -> Sums:
        return self._sum(range(len(self.answers)))

    def by_category(self) -> dict[str, Sums]:
        return {
            kind: self._sum([i for i, of in enumerate(self.categories) if of == kind])
            for kind in dict.fromkeys(self.categories)
        }

    def _sum(self, which: Sequence[int]) -> Sums:
        total = Sums()
        for i in which:
            total.add(self.answers[i])
        return total


@dataclass(frozen=True, slots=True)
class Costs:
    """All that takes time on this machine, for `points.sequences` answers at once.

    batch    curves of every batch size measured, for engines with one plan for a batch that changes
    uniform  of such a batch: as many guesses for every sequence, or none
    """

    points: CostPoints
    expense: Expense
    batch: tuple[CostPoints, ...] = ()
    uniform: bool = False
