"""The number of threads that compute passes: fewer than allowed while other programs keep cores busy.

llama.cpp's threads wait for each other in every layer, by spinning. Where one of them has no core to itself, all wait
for the scheduler's next time slice, and a pass takes up to a hundred times as long as with one thread less.
Decides a number; does not depend on passes or drafts.
"""

from __future__ import annotations

from collections.abc import Callable

from specplug.machine.cores import core_limit
from specplug.machine.free_cores import FreeCores

CONFIRMATIONS = 2
"""Readings in a row that have to show more free cores before the number of threads rises."""


class ThreadCount:
    """Follows the free cores between 1 thread and `most`."""

    def __init__(
        self, most: int, *, read: Callable[[], float | None] | None = None, share: float | None = None
    ) -> None:
        """
        read   CPUs that are idle or used by this process; None where nothing new is known
        share  cores per CPU: below 1 where each core has two
        """
        self.now = self.most = most
        self._read = read or FreeCores().read
        self._share = core_limit().share if share is None else share
        self._more = 0

    def changed(self) -> bool:
        """Read the free cores where that is due; True if `now` has changed."""
        if self.most == 1:
            return False
        free = self._read()
        if free is None:
            return False
        fitting = max(1, min(self.most, int(free * self._share + 0.5)))
        self._more = self._more + 1 if fitting > self.now else 0
        if fitting < self.now or self._more >= CONFIRMATIONS:
            self.now, self._more = fitting, 0
            return True
        return False
