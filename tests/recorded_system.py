"""Writes files of Linux's /proc and /sys below a folder, as machines and containers have them."""

from collections.abc import Mapping
from pathlib import Path

V1_MOUNT = "33 31 0:30 {inside} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}"
V2_MOUNT = "41 31 0:38 {inside} {at} rw,relatime - cgroup2 cgroup2 rw"


def write_files(root: Path, files: Mapping[str, str]) -> Path:
    """Write text files by their paths from the root on; returns the root."""
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def cpus(count: int, threads_per_core: int = 1) -> dict[str, str]:
    """The topology of a machine: CPU i and CPU i + cores share a core, as Linux numbers them."""
    cores = count // threads_per_core
    files = {"/sys/devices/system/cpu/online": f"0-{count - 1}"}
    for cpu in range(count):
        siblings = ",".join(str(cpu % cores + cores * thread) for thread in range(threads_per_core))
        files[f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = siblings
    return files


def v2(path: str, files: Mapping[str, str], *, inside: str = "/", at: str = "/sys/fs/cgroup") -> dict[str, str]:
    """Version 2 of cgroups: the process is in `path`; `files` by their path below the mount."""
    return {
        "/proc/self/cgroup": f"0::{path}",
        "/proc/self/mountinfo": V2_MOUNT.format(inside=inside, at=at),
        "/sys/fs/cgroup/cgroup.controllers": "cpu memory",
    } | {f"/sys/fs/cgroup/{name}": text for name, text in files.items()}


def v1(name: str, path: str, files: Mapping[str, str], *, inside: str = "/") -> dict[str, str]:
    """Version 1 of cgroups for one controller, with version 2 beside it that holds no limits (the hybrid layout)."""
    mounts = [V1_MOUNT.format(inside=inside, name=name), V2_MOUNT.format(inside="/", at="/sys/fs/cgroup/unified")]
    return {
        "/proc/self/cgroup": f"4:{name}:{path}\n1:name=systemd:/user.slice\n0::/user.slice",
        "/proc/self/mountinfo": "\n".join(mounts),
        "/sys/fs/cgroup/unified/cgroup.procs": "",
    } | {f"/sys/fs/cgroup/{name}/{file}": text for file, text in files.items()}
