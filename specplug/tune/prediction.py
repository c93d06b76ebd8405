"""The costs that a replay receives, and the prediction that it returns.

This module holds data only. The replays themselves are in replay.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specplug.core import NO_LIMITS, DraftLimits
from specplug.profile import CostPoints
from specplug.tune.drafter_trace import DrafterTrace
from specplug.tune.expense import Expense

POSITIONS = 16
"""Draft positions for which acceptance is counted separately."""


@dataclass(slots=True)
class Sums:
    """Sums over some answers. Times are milliseconds: `ms` with the setting, `plain_ms` with plain decoding.

    offered_at   by position: how many drafts were that long
    accepted_at  by position: how many drafts were accepted up to it
    """

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
    """The replay of one setting over one trace.

    answers     sums by answer, in the trace's order
    categories  of the answers
    learned     the acceptance counts of the buckets at the end
    """

    answers: tuple[Sums, ...]
    categories: tuple[str, ...]
    learned: Mapping[str, tuple[float, float]]

    @property
    def total(self) -> Sums:
        return self._sum(range(len(self.answers)))

    def by_category(self) -> dict[str, Sums]:
        return {
            category: self._sum([i for i, own in enumerate(self.categories) if own == category])
            for category in dict.fromkeys(self.categories)
        }

    def _sum(self, which: Sequence[int]) -> Sums:
        total = Sums()
        for i in which:
            total.add(self.answers[i])
        return total


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything that takes time on this machine, for `points.sequences` answers at once.

    points   the cost curve of passes
    expense  the cost of drafting
    batch    the cost curves of all measured batch sizes, for engines that plan once for a changing batch
    uniform  whether all sequences of such a batch have drafts of the same length
    drafters  the recorded drafters, by `drafter_key`
    limits   limits of the target's memory for drafts
    plain_scale  time of plain decoding, which may have engine settings of its own, relative to that of `points`
    """

    points: CostPoints
    expense: Expense
    batch: tuple[CostPoints, ...] = ()
    uniform: bool = False
    drafters: Mapping[str, DrafterTrace] = field(default_factory=dict)
    plain_scale: float = 1.0
    limits: DraftLimits = NO_LIMITS
