"""The memory that can still be taken: the machine's, and the limits of control groups, on recorded trees of files."""

from pathlib import Path

import psutil
import pytest
from recorded_system import v1, v2, write_files

from specplug.machine.memory import AvailableMemory, available_memory, gib

MIB = 1 << 20


def test_without_a_limit_the_machine_decides(tmp_path: Path) -> None:
    for name, files in {
        "none": {},
        "max": v2("/a", {"a/memory.max": "max", "a/memory.current": str(MIB)}),
        "v1": v1("memory", "/a", {"a/memory.limit_in_bytes": str(2**63 - 4096), "a/memory.usage_in_bytes": "0"}),
        "damaged": v2("/", {"memory.max": "much", "memory.current": "?"}),
        "large": v2("/", {"memory.max": str(1 << 50), "memory.current": "0"}),
    }.items():
        found = available_memory(write_files(tmp_path / name, files))
        assert found.limit is None and 0 < found.free <= psutil.virtual_memory().total


def test_a_limit_is_reduced_by_what_is_used_without_cached_files(tmp_path: Path) -> None:
    stat = "anon 1\ninactive_file {}\nactive_file {}\nunevictable 0\n"
    newer = {
        "a/memory.max": str(64 * MIB),
        "a/memory.current": str(50 * MIB),
        "a/memory.stat": stat.format(20 * MIB, 10 * MIB),
    }
    assert available_memory(write_files(tmp_path, v2("/a", newer))) == AvailableMemory(44 * MIB, 64 * MIB)
    older = {
        "a/memory.limit_in_bytes": str(64 * MIB),
        "a/memory.usage_in_bytes": str(50 * MIB),
        "a/memory.stat": "inactive_file 5\ntotal_inactive_file 1048576\ntotal_active_file 0",
    }
    found = available_memory(write_files(tmp_path / "older", v1("memory", "/a", older)))
    assert found == AvailableMemory(15 * MIB, 64 * MIB)


def test_the_tightest_group_counts_and_nothing_is_negative(tmp_path: Path) -> None:
    files = {
        "a/b/memory.max": str(64 * MIB),
        "a/b/memory.current": str(MIB),
        "a/memory.max": str(32 * MIB),
        "a/memory.current": str(30 * MIB),
    }
    assert available_memory(write_files(tmp_path, v2("/a/b", files))) == AvailableMemory(2 * MIB, 32 * MIB)
    over = {"memory.max": str(8 * MIB), "memory.current": str(9 * MIB)}
    assert available_memory(write_files(tmp_path / "over", v2("/", over))) == AvailableMemory(0, 8 * MIB)


def test_the_words_name_the_limit() -> None:
    assert str(AvailableMemory(3 << 30)) == "3.0 GiB are free"
    assert str(AvailableMemory(5 << 28, 8 << 30)) == "1.2 GiB are free (limit of the container: 8.0 GiB)"


@pytest.mark.parametrize(("size", "text"), [(0, "0.000"), (4 << 20, "0.004"), (1 << 28, "0.25"), (13 << 30, "13.0")])
def test_sizes_keep_the_digits_that_matter(size: int, text: str) -> None:
    assert gib(size) == text
