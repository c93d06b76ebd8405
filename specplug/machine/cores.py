"""How many threads compute fastest here: the cores that this process may use, and what limits them.

The limits are CPU affinity, quotas of containers, cores that run two threads each, and slow cores beside fast ones.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from specplug.machine.cgroups import groups, read

SLOW = 0.6
"""Share of the fastest core's capacity; cores below it are left out, since every pass waits for its slowest thread."""

MAX_CPUS = 1 << 16
"""A list of CPUs with higher numbers is damaged."""

CPUS = "sys/devices/system/cpu"


@dataclass(frozen=True, slots=True)
class CoreLimit:
    """cores: threads that can compute at once, at least 1. reason: what decides the number, in words. share: cores per
    CPU that this process may use: below 1 where a core has two CPUs, or where slow cores are left out."""

    cores: int
    reason: str
    share: float = 1.0


@lru_cache(maxsize=1)
def core_limit() -> CoreLimit:
    """The limit of this process, read once."""
    return read_core_limit(levels=_levels())


def read_core_limit(
    root: Path = Path("/"),
    *,
    allowed: Collection[int] | None = None,
    levels: tuple[int, int] | None = None,
) -> CoreLimit:
    """The limit by the files of Linux below `root`, which need not exist.

    allowed  CPUs of the affinity mask; that of this process where None
    levels   performance and efficiency cores by macOS
    """
    online = online_cpus(root)
    cpus = sorted(allowed_cpus() if allowed is None else allowed)
    steps = []
    if len(cpus) < len(online):
        steps.append(f"CPU affinity: {len(cpus)} of {len(online)}")
    fast = _fast(cpus, root)
    cores = _physical(fast, root)
    if len(fast) < len(cpus):
        slow = [cpu for cpu in cpus if cpu not in fast]
        steps.append(_left_out(cores, _physical(slow, root)))
    elif levels is not None and 0 < levels[0] < len(cpus):
        cores = levels[0]
        steps.append(_left_out(*levels))
    elif cores < len(cpus):
        steps.append(f"{cores} physical cores of {len(cpus)} logical ones (SMT)")
    quota, share = cpu_quota(root), cores / max(1, len(cpus))
    if quota is not None and quota < cores:
        return CoreLimit(max(1, int(quota)), f"a CPU quota of {round(quota, 2)} cores (cgroup)", share)
    return CoreLimit(cores, ", ".join(steps) or ("the only core" if cores == 1 else f"all {cores} cores"), share)


def allowed_cpus() -> set[int]:
    """The CPUs that the operating system lets this process use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def online_cpus(root: Path = Path("/")) -> set[int]:
    """The CPUs of the machine that are switched on."""
    return cpu_list(read(root / CPUS / "online")) or set(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the tightest control group grants; None where there is no quota."""
    quotas = []
    for group in groups("cpu", root):
        if group.version == 2:
            words = group.text("cpu.max").split()
        else:
            words = [group.text(name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):  # no quota is `max`, or -1
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def cpu_list(text: str) -> set[int]:
    """The numbers in a list of the kernel, such as `0-3,8`; empty where it is damaged."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal() or int(last) >= MAX_CPUS:
            return set()
        cpus |= set(range(int(first), int(last) + 1))
    return cpus


def _fast(cpus: Collection[int], root: Path) -> list[int]:
    """The CPUs without the clearly slower ones: Intel's efficiency cores, and little cores of Arm."""
    fast = cpu_list(read(root / "sys/devices/cpu_core/cpus")).intersection(cpus)
    if fast and cpu_list(read(root / "sys/devices/cpu_atom/cpus")).intersection(cpus):
        return sorted(fast)
    capacities = {cpu: read(root / CPUS / f"cpu{cpu}/cpu_capacity").strip() for cpu in cpus}
    if not all(capacity.isdecimal() for capacity in capacities.values()):
        return sorted(cpus)
    most = max(map(int, capacities.values()), default=0)
    return sorted(cpu for cpu, capacity in capacities.items() if int(capacity) >= SLOW * most)


def _physical(cpus: Iterable[int], root: Path) -> int:
    """The number of cores to which the CPUs belong: siblings share one."""
    cores = set()
    for cpu in cpus:
        folder = root / CPUS / f"cpu{cpu}/topology"
        siblings = cpu_list(read(folder / "thread_siblings_list")) or cpu_list(read(folder / "core_cpus_list"))
        cores.add(min(siblings) if cpu in siblings else cpu)
    return len(cores)


def _left_out(fast: int, slow: int) -> str:
    return f"{fast} performance cores ({slow} efficiency cores are left out)"


def _levels() -> tuple[int, int] | None:
    """Cores of macOS's two performance levels; None elsewhere, and where all cores are alike."""
    if platform.system() != "Darwin":
        return None
    counts = [sysctl(f"hw.perflevel{level}.physicalcpu") for level in (0, 1)]
    return (int(counts[0]), int(counts[1])) if all(count.isdecimal() for count in counts) else None


def sysctl(name: str) -> str:
    """A value of macOS's kernel; empty where there is none."""
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
