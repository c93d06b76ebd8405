"""Selects the proposers to ask in a step, and keeps account of the time that each of them costs and saves.

Both speculators use it: one of trees for a few sequences, one of chains for a batch. A proposer is asked unless its
back-off is in a cooldown; afterwards it is credited with the time that its drafts save, and charged with the time that
asking it took. How much time a plan saves is calculated by the speculators: this module does not depend on drafts, the
planner or an engine.
Source: our own.
State: one back-off and one timing per proposer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Protocol

from specplug.core import ModelBased, Requires
from specplug.planning.back_off import BackOff


class Asked(Protocol):
    """The attributes of a proposer that are used here; `core.Proposer` and `drafts.chains.ChainProposer` have them."""

    requires: Requires


class ProposerSelection:
    """Selects the proposers to ask, measures their time and credits the time that they save.

    Per step: call `select`. Where it returns True, ask the proposers of `asked`, add the time that each takes to
    `spent_ns`, and report the result to `credit`.
    """

    def __init__(self, proposers: Sequence[Asked], clock: Callable[[], int], *, static: bool = False) -> None:
        """
        clock   nanoseconds
        static  True asks every proposer in every step
        """
        self.asked: list[int] = []
        """The proposers that are asked in the current step, by index."""
        self.spent_ns = [0] * len(proposers)
        """Time that each proposer took in the current step."""
        self.back_offs = [BackOff(expensive=isinstance(proposer, ModelBased)) for proposer in proposers]
        self._proposers = tuple(proposers)
        self._clock = clock
        self._static = static
        self._passes = [proposer.passes if isinstance(proposer, ModelBased) else 0 for proposer in proposers]
        self._began_ns = 0

    def start_text(self) -> None:
        """A new sequence begins."""
        for back_off in self.back_offs:
            back_off.start_text()

    def select(self, *, plain_due: bool, idle: Set[int] = frozenset()) -> bool:
        """Count one step and choose the proposers to ask in it; True if there is any.

        plain_due  whether a plain pass should be made in this step, so that none is asked
        idle       the proposers, by index, that draft for none of the running sequences: they are not asked
        """
        self.asked = [
            index
            for index, back_off in enumerate(self.back_offs)
            if index not in idle and (self._static or (back_off.tick() and not plain_due))
        ]
        if not self.asked:
            return False
        self.spent_ns = [0] * len(self._proposers)
        self.start_clock()
        return True

    def start_clock(self) -> None:
        """The time since `select` belongs to earlier steps, and is not charged."""
        self._began_ns = self._clock()

    def decline(self) -> None:
        """All that are asked are expensive ones that decline: as if none were asked in this step."""
        for index in self.asked:
            self.back_offs[index].decline()
        self.asked = []

    def topk(self) -> int:
        """The most top ids per row that those asked require."""
        return max((self._proposers[index].requires.topk for index in self.asked), default=0)

    def common_ns(self) -> int:
        """Time since `select`, without the time of the proposers."""
        return self._clock() - self._began_ns - sum(self.spent_ns)

    def credit(
        self,
        *,
        common_ns: float,
        topk_ns: float,
        plain_ms: float,
        expected_ms: Callable[[Sequence[int]], float],
        measured_ms: Callable[[int], float] | None = None,
        occupied: Sequence[int] = (),
    ) -> None:
        """Report to the back-off of every proposer that was asked the time that it saved and the time that it cost.

        A token that several propose is credited to the cheapest of them, so that an expensive proposer is credited only
        for tokens that no cheaper one proposes.

        common_ns    time that drafting took besides the proposers: they share it equally
        topk_ns      time that reading the top ids took: those that require them share it
        plain_ms     time of a plain step
        expected_ms  time that the plan is expected to save without the drafts of these proposers
        measured_ms  time that the drafts of this expensive proposer saved in the pass, negative where they lost; not
                     required where there is none
        occupied     expensive proposers that were reading, which is neither a draft nor declining
        """
        num_readers = sum(self._proposers[index].requires.topk > 0 for index in self.asked)
        by_cost = sorted(self.asked, key=lambda index: self.back_offs[index].cost_ms)
        credited_ms = 0.0
        for place, index in enumerate(by_cost, start=1):
            saved_ms = expected_ms(by_cost[place:])
            spent_ns = self.spent_ns[index] + common_ns / len(by_cost)
            if self._proposers[index].requires.topk:
                spent_ns += topk_ns / num_readers
            back_off = self.back_offs[index]
            if not back_off.expensive:
                back_off.record(spent_ns / 1e6, saved_ms - credited_ms, plain_ms)
            elif self._ran(index):
                assert measured_ms is not None
                back_off.record(spent_ns / 1e6, measured_ms(index), plain_ms)
            elif index not in occupied:
                back_off.decline()
            credited_ms = saved_ms

    def _ran(self, index: int) -> bool:
        """Whether an expensive proposer has run a pass since this was last called for it."""
        proposer = self._proposers[index]
        assert isinstance(proposer, ModelBased)
        before, self._passes[index] = self._passes[index], proposer.passes
        return proposer.passes > before
