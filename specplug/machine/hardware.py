"""The hardware of this machine, and whether the machine is idle enough to measure on.

The facts come from the operating system and from NVIDIA's library. Nothing here depends on an engine or a model.
"""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from specplug.machine.cores import allowed_cpus, core_limit, online_cpus, sysctl

BUSY = 0.25
"""Share of the cores; where more of them are busy with other work, measurements are not reliable."""

SAMPLE_SECONDS = 0.3
"""How long CPU use is observed."""

READ_BYTES = 256 << 20
"""Bytes that all cores together read when bandwidth is measured: more than caches hold."""


def fingerprint() -> dict[str, Any]:
    """Plain data that identifies the machine: two machines with equal data have the same speed."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def usable_cores() -> int:
    """Threads that can compute at once in this process, by `cores.core_limit`: the default of engines."""
    return core_limit().cores


def busy_cores() -> float:
    """How many of the usable cores other work, or this process itself, left no room on during SAMPLE_SECONDS."""
    shares: list[float] = psutil.cpu_percent(interval=SAMPLE_SECONDS, percpu=True)
    own = allowed_cpus()
    numbered = sorted(online_cpus())
    if len(numbered) == len(shares):
        shares = [share for cpu, share in zip(numbered, shares, strict=True) if cpu in own] or shares
    limit = core_limit()
    idle = (len(shares) - sum(shares) / 100) * limit.share
    return round(max(0.0, limit.cores - idle), 2)


def busy_warning() -> str | None:
    """A warning where other work keeps too many cores busy to measure; None otherwise. Takes SAMPLE_SECONDS."""
    load = too_busy()
    return None if load is None else f"{load} are busy with other work, so measured speeds are not reliable"


def too_busy() -> str | None:
    """For example `1.5 of 2 cores`, where other work keeps too many busy to measure; None otherwise."""
    busy, cores = busy_cores(), usable_cores()
    return None if busy <= BUSY * cores else f"{busy:.1f} of {cores} cores"


def read_bandwidth() -> float:
    """GiB/s at which all usable cores together read memory: the best of three reads, some tenths of a second in all."""
    cores = usable_cores()
    blocks = np.array_split(np.ones(READ_BYTES // 8, dtype=np.int64), cores)
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:  # NumPy releases the GIL while it sums
        for _ in range(3):
            start = perf_counter()
            list(pool.map(np.sum, blocks))
            best = max(best, READ_BYTES / 2**30 / (perf_counter() - start))
    return round(best, 1)


def gpus() -> list[dict[str, Any]]:
    """name, memory_gib and driver of every NVIDIA GPU; nothing where `nvidia-ml-py` or a driver is missing."""
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # no package, no driver and no permission raise different exceptions
        return []
    try:
        devices = []
        for index in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            devices.append({"name": nvml.nvmlDeviceGetName(device), "driver": nvml.nvmlSystemGetDriverVersion()})
            memory = nvml.nvmlDeviceGetMemoryInfo(device).total / 2**30  # not every device reports it
            devices[-1]["memory_gib"] = round(memory, 1)
        return devices
    except nvml.NVMLError:
        return devices
    finally:
        nvml.nvmlShutdown()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        name = sysctl("machdep.cpu.brand_string")
        if name:
            return name
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    total: int = psutil.virtual_memory().total
    return round(total / 2**30, 1)
