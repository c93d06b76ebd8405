"""What machine this is, and whether it is idle enough to measure on.

Knows the operating system's own files and calls. Knows no engine and no accelerator.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

BUSY = 0.25
"""Load per core from which measurements are not to be trusted."""


def fingerprint() -> dict[str, Any]:
    """Plain data that names the machine: two equal ones run alike."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def usable_cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that ran or waited in the last minute, on average; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def busy_warning() -> str | None:
    """Why not to measure now, or None."""
    load, cores = load_average(), usable_cores()
    if load is None or load <= BUSY * cores:
        return None
    return f"load average {load:.2f} on {cores} cores: other work runs, so measured speeds are not to be trusted"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
