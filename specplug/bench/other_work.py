"""How many cores other programs kept busy while something was measured."""

from __future__ import annotations

from specplug.machine import hardware
from specplug.machine.cores import allowed_cpus, core_limit
from specplug.machine.free_cores import FreeCores


class OtherWork:
    """Counts from its creation on. This process has to compute most of the time meanwhile."""

    def __init__(self, free_cores: FreeCores | None = None) -> None:
        self._free = free_cores or FreeCores()
        self._free.read()

    def cores(self) -> float:
        """The mean since the creation or the last call; 0 where less than a quarter of a second has passed."""
        free = self._free.read()
        return 0.0 if free is None else max(0.0, (len(allowed_cpus()) - free) * core_limit().share)


def is_too_much(cores: float) -> bool:
    """Whether measurements beside so much other work are not reliable."""
    return cores > hardware.BUSY * hardware.usable_cores()
