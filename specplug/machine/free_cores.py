"""How many cores this process can use now, beside the other work of the machine.

Reads the processor time that the operating system counts. It depends neither on an engine nor on threads.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path
from time import perf_counter, process_time, sleep

import psutil

from specplug.machine.cores import allowed_cpus, online_cpus

INTERVAL_S = 0.25
"""Seconds between two readings; the counters of Linux have steps of 10 ms."""

PAUSE_S = 1.0
"""Seconds without a reading after which what was read before says nothing about now."""

COMPUTING = 0.5
"""Cores. Where this process used more in the mean, it computed all the time, and there was no pause."""

LOOKS, LOOK_S = 5, 0.002
"""How often the run queue is looked at after a pause, and the seconds between two looks: the shortest queue counts, as
many tasks run for an instant only."""


class FreeCores:
    """Call `read` once per step; it costs a microsecond where nothing is due."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = perf_counter,
        own_seconds: Callable[[], float] = process_time,
        idle_seconds: Callable[[], float] | None = None,
        waiting: Callable[[], int | None] | None = None,
    ) -> None:
        """
        clock         seconds
        own_seconds   processor time of this process
        idle_seconds  time that the CPUs which this process may use were idle, in seconds, summed over them
        waiting       tasks of others that run or wait for a CPU of the machine now; None where that is unknown
        """
        self._clock = clock
        self._own_seconds = own_seconds
        self._idle_seconds = idle_seconds or _idle_seconds
        self._waiting = waiting or _others_in_run_queue
        self._last = (-inf, 0.0, 0.0)

    def read(self) -> float | None:
        """CPUs that are idle or used by this process: the mean since the last reading, or after a pause as the run
        queue shows; None where no reading is due or nothing is known."""
        now = self._clock()
        last_time, last_own, last_idle = self._last
        elapsed = now - last_time
        if elapsed < INTERVAL_S:
            return None
        own, idle = self._own_seconds(), self._idle_seconds()
        self._last = now, own, idle
        if elapsed < PAUSE_S or own - last_own > COMPUTING * elapsed:
            return (own - last_own + idle - last_idle) / elapsed
        others = self._waiting()
        return None if others is None else max(0.0, float(len(online_cpus()) - others))


def _idle_seconds() -> float:
    own, numbered = allowed_cpus(), sorted(online_cpus())
    if len(own) == len(numbered):
        return _idle(psutil.cpu_times())
    times = psutil.cpu_times(percpu=True)
    if len(times) != len(numbered):
        return _idle(psutil.cpu_times()) * len(own) / len(times)
    return sum(_idle(one) for cpu, one in zip(numbered, times, strict=True) if cpu in own)


def _idle(times: object) -> float:
    return float(getattr(times, "idle", 0.0)) + float(getattr(times, "iowait", 0.0))


def _others_in_run_queue() -> int | None:
    """The shortest run queue of a few looks, without this process.

    Known on Linux only, and only where this process may use all CPUs: the queue is that of all of them.
    """
    if len(allowed_cpus()) < len(online_cpus()):
        return None
    shortest = None
    for look in range(LOOKS):
        if look:
            sleep(LOOK_S)
        try:
            running = int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):
            return None
        others = max(0, running - 1)
        shortest = others if shortest is None else min(shortest, others)
    return shortest
