"""How much memory this process can still get: the free memory of the machine, and the limits of its control groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from specplug.machine.cgroups import Group, groups

NO_LIMIT = 1 << 60
"""Bytes; version 1 of cgroups writes a number near 2**63 where there is no limit."""

FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
"""By version: the limit of a group, and what it uses, cached files included. Both in bytes."""

CACHED = {1: ("total_inactive_file", "total_active_file"), 2: ("inactive_file", "active_file")}
"""Lines of memory.stat with the bytes of cached files, which the kernel gives up when memory is needed."""


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """free: bytes that can be taken. limit: bytes of the control group that decides it; None for the machine itself."""

    free: int
    limit: int | None = None

    def __str__(self) -> str:
        """For example `8.0 GiB are free (limit of the container: 8.0 GiB)`."""
        limit = f" (limit of the container: {gib(self.limit)} GiB)" if self.limit is not None else ""
        return f"{gib(self.free)} GiB are free{limit}"


def available_memory(root: Path = Path("/")) -> AvailableMemory:
    """The least of what the machine and every control group of this process can still give. `root`: see `groups`."""
    found = AvailableMemory(int(psutil.virtual_memory().available))
    for group in groups("memory", root):
        limit, used = (group.number(name) for name in FILES[group.version])
        if limit is None or not 0 <= limit < NO_LIMIT:
            continue
        free = max(0, limit - max(0, (used or 0) - _cached(group)))
        if free < found.free:
            found = AvailableMemory(free, limit)
    return found


def gib(size: float) -> str:
    """Bytes as a number of GiB, with the digits that matter: 0.004, 0.31 or 12.3."""
    amount = size / 2**30
    return f"{amount:.1f}" if amount >= 1 else f"{amount:.2f}" if amount >= 0.1 else f"{amount:.3f}"


def _cached(group: Group) -> int:
    found = dict(line.split(" ", 1) for line in group.text("memory.stat").splitlines() if " " in line)
    values = (found.get(name, "").strip() for name in CACHED[group.version])
    return sum(int(value) for value in values if value.isdecimal())
