"""The control groups of this process: the folders in which Linux keeps their limits, without reading the limits.

Both versions of cgroups are found, also side by side, and also where a container sees a part of the tree only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FALLBACK = "sys/fs/cgroup"
"""Where cgroups are mounted on all common systems; read where /proc says nothing about mounts."""


@dataclass(frozen=True, slots=True)
class Group:
    """A folder of limits. version: 1 or 2, which name their files differently."""

    version: int
    folder: Path

    def number(self, file: str) -> int | None:
        """The whole number in one of the group's files; None where there is none, such as `max`."""
        text = self.text(file).strip()
        return int(text) if re.fullmatch(r"-?\d{1,20}", text) else None

    def text(self, file: str) -> str:
        """The contents of one of the group's files; empty where it cannot be read."""
        return read(self.folder / file)


def groups(controller: str, root: Path = Path("/")) -> list[Group]:
    """The groups of this process for a controller (`cpu`, `memory`), each followed by its ancestors; the limits of all
    of them hold.

    A path that is not below the mount, as in a container with a namespace of its own, stands for the mount's root.
    """
    own = _own_paths(root)
    found: list[Group] = []
    for version, inside, folder in _mounts(controller, root):
        path = own.get(controller if version == 1 else "", "/")
        for relative in _upwards(path, inside):
            candidate = folder / relative
            if candidate.is_dir() and Group(version, candidate) not in found:
                found.append(Group(version, candidate))
    return found


def _own_paths(root: Path) -> dict[str, str]:
    """The path of this process's group by controller of version 1; that of version 2 has the empty name."""
    paths: dict[str, str] = {}
    for line in read(root / "proc/self/cgroup").splitlines():
        number, colon, rest = line.partition(":")
        names, second, path = rest.partition(":")
        if colon and second and path.startswith("/"):
            paths |= dict.fromkeys(names.split(","), path)
            if number == "0" and not names:
                paths[""] = path
    return paths


def _mounts(controller: str, root: Path) -> list[tuple[int, str, Path]]:
    """(version, the part of the tree that is mounted, folder) of every mount that can hold the controller's limits."""
    found = []
    for line in read(root / "proc/self/mountinfo").splitlines():
        left, dash, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if not dash or len(before) < 6 or len(after) < 3:
            continue
        inside, at = _unescaped(before[3]), root / _unescaped(before[4]).lstrip("/")
        if after[0] == "cgroup2":
            found.append((2, inside, at))
        elif after[0] == "cgroup" and controller in after[2].split(","):
            found.append((1, inside, at))
    if found:
        return found
    at = root / FALLBACK
    v1 = [folder for folder in (at / controller, at / "cpu,cpuacct") if folder.is_dir() and controller in folder.name]
    return [(1, "/", folder) for folder in v1[:1]] or [(2, "/", at)]


def _upwards(path: str, inside: str) -> list[str]:
    """The paths below a mount of the tree's part `inside` that belong to the group `path` and its ancestors."""
    parts = path.strip("/").split("/")
    if ".." in parts:  # a group outside of the namespace of the process
        return [""]
    if inside != "/" and (path + "/").startswith(inside.rstrip("/") + "/"):
        parts = path[len(inside) :].strip("/").split("/")
    return ["/".join(parts[:length]) for length in range(len(parts), 0, -1) if parts[0]] + [""]


def _unescaped(field: str) -> str:
    """A field of mountinfo, in which the kernel writes spaces and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def read(path: Path) -> str:
    """The text of a small file of the kernel; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""
