"""The number of threads that compute at once: affinity, quotas, SMT and slow cores, on recorded trees of files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recorded_system import cpus, v1, v2, write_files

from specplug.machine import hardware
from specplug.machine.cores import CoreLimit, core_limit, cpu_list, cpu_quota, read_core_limit

V1_ROOT = Path("/sys/fs/cgroup/cpu")
PROGRAM = "from specplug.machine.hardware import usable_cores; print(usable_cores())"


def limit(root: Path, allowed: int = 8) -> CoreLimit:
    return read_core_limit(root, allowed=range(allowed))


# -- affinity, SMT and slow cores --------------------------------------------------------------------------------------


def test_all_cores_where_nothing_limits_them(tmp_path: Path) -> None:
    root = write_files(tmp_path, cpus(8))
    assert limit(root) == CoreLimit(8, "all 8 cores")
    assert read_core_limit(write_files(tmp_path / "one", cpus(1)), allowed=[0]) == CoreLimit(1, "the only core")


def test_affinity_names_both_numbers(tmp_path: Path) -> None:
    assert limit(write_files(tmp_path, cpus(8)), 2) == CoreLimit(2, "CPU affinity: 2 of 8")


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    root = write_files(tmp_path, cpus(8, threads_per_core=2))
    assert limit(root) == CoreLimit(4, "4 physical cores of 8 logical ones (SMT)", 0.5)
    assert limit(root, 4) == CoreLimit(4, "CPU affinity: 4 of 8")
    both = read_core_limit(root, allowed=[0, 1, 4, 5])
    assert both == CoreLimit(2, "CPU affinity: 4 of 8, 2 physical cores of 4 logical ones (SMT)", 0.5)


def test_the_newer_name_of_the_list_of_siblings_is_read(tmp_path: Path) -> None:
    files = {name.replace("thread_siblings_list", "core_cpus_list"): text for name, text in cpus(8, 2).items()}
    assert limit(write_files(tmp_path, files)).cores == 4


def test_intels_efficiency_cores_are_left_out(tmp_path: Path) -> None:
    """Six performance cores of two threads each, and four efficiency cores."""
    files = {"/sys/devices/system/cpu/online": "0-15"}
    for cpu in range(12):
        files[f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}"
    files |= {"/sys/devices/cpu_core/cpus": "0-11", "/sys/devices/cpu_atom/cpus": "12-15"}
    root = write_files(tmp_path, files)
    assert limit(root, 16) == CoreLimit(6, "6 performance cores (4 efficiency cores are left out)", 6 / 16)
    only_slow = read_core_limit(root, allowed=[12, 13, 14])
    assert only_slow == CoreLimit(3, "CPU affinity: 3 of 16"), "nothing else may be used"


def test_arms_little_cores_are_left_out_and_middle_ones_are_not(tmp_path: Path) -> None:
    capacities = {"": [1024, 860, 860, 860, 300, 300, 300, 300], "alike": [1024] * 8, "damaged": [1024] * 7}
    for name, values in capacities.items():
        files = cpus(8) | {f"/sys/devices/system/cpu/cpu{i}/cpu_capacity": str(c) for i, c in enumerate(values)}
        write_files(tmp_path / name, files)
    assert limit(tmp_path) == CoreLimit(4, "4 performance cores (4 efficiency cores are left out)", 0.5)
    assert limit(tmp_path / "alike").cores == limit(tmp_path / "damaged").cores == 8


def test_macos_names_its_performance_cores(tmp_path: Path) -> None:
    root = write_files(tmp_path, cpus(10))
    found = read_core_limit(root, allowed=range(10), levels=(6, 4))
    assert found == CoreLimit(6, "6 performance cores (4 efficiency cores are left out)", 0.6)


# -- quotas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cores", "quota"),
    [("100000 100000", 1, "1.0"), ("350000 100000", 3, "3.5"), ("20000 100000", 1, "0.2"), ("33333 100000", 1, "0.33")],
)
def test_a_quota_is_rounded_down_to_at_least_one_core(text: str, cores: int, quota: str, tmp_path: Path) -> None:
    root = write_files(tmp_path, cpus(8) | v2("/a", {"a/cpu.max": text}))
    assert limit(root) == CoreLimit(cores, f"a CPU quota of {quota} cores (cgroup)")


def test_a_quota_above_the_cores_does_not_count(tmp_path: Path) -> None:
    root = write_files(tmp_path, cpus(8) | v2("/a", {"a/cpu.max": "1600000 100000"}))
    assert (cpu_quota(root), limit(root)) == (16.0, CoreLimit(8, "all 8 cores"))


def test_the_tightest_quota_among_the_ancestors_counts(tmp_path: Path) -> None:
    files = {"a/b/c/cpu.max": "max 100000", "a/b/cpu.max": "200000 100000", "a/cpu.max": "600000 100000"}
    assert cpu_quota(write_files(tmp_path, v2("/a/b/c", files))) == 2.0
    assert cpu_quota(write_files(tmp_path / "above", v2("/a", files))) == 6.0, "a group below is not the process's own"


def test_a_group_that_is_not_below_the_mount_stands_for_the_mounts_root(tmp_path: Path) -> None:
    """In a container, /proc can name the path on the host, or one outside of the namespace."""
    for number, path in enumerate(("/system.slice/docker-1f.scope", "/../other", "/")):
        root = write_files(tmp_path / str(number), v2(path, {"cpu.max": "150000 100000"}))
        assert cpu_quota(root) == 1.5


def test_the_part_of_the_tree_that_a_container_sees(tmp_path: Path) -> None:
    """Docker with cgroups 1: the mount shows the container's own group, /proc names its path on the host."""
    quota = {"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}
    assert cpu_quota(write_files(tmp_path, v1("cpu", "/docker/1f", quota, inside="/docker/1f"))) == 2.0
    nested = {f"job/{name}": text for name, text in quota.items()}
    assert cpu_quota(write_files(tmp_path / "b", v1("cpu", "/docker/1f/job", nested, inside="/docker/1f"))) == 2.0
    other = v1("cpu", "/docker/1fa/job", nested, inside="/docker/1f")
    assert cpu_quota(write_files(tmp_path / "c", other)) is None, "another container's name begins alike"


def test_version_1_with_its_ancestors_and_both_versions_side_by_side(tmp_path: Path) -> None:
    files = {
        "a/b/cpu.cfs_quota_us": "-1",
        "a/b/cpu.cfs_period_us": "100000",
        "a/cpu.cfs_quota_us": "75000",
        "a/cpu.cfs_period_us": "50000",
    }
    assert cpu_quota(write_files(tmp_path, v1("cpu", "/a/b", files))) == 1.5
    hybrid = v1("cpu", "/a/b", files) | {"/sys/fs/cgroup/unified/user.slice/cpu.max": "50000 100000"}
    assert cpu_quota(write_files(tmp_path / "hybrid", hybrid)) == 0.5


def test_controllers_that_share_a_mount(tmp_path: Path) -> None:
    quota = {"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}
    assert cpu_quota(write_files(tmp_path, v1("cpu,cpuacct", "/", quota))) == 3.0


def test_the_usual_folder_is_read_where_proc_names_no_mount(tmp_path: Path) -> None:
    assert cpu_quota(write_files(tmp_path, {"/sys/fs/cgroup/cpu.max": "200000 100000"})) == 2.0
    old = {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    assert cpu_quota(write_files(tmp_path / "old", old)) == 1.0


def test_a_mount_with_a_space_in_its_path(tmp_path: Path) -> None:
    files = v2("/", {}, at="/my\\040groups") | {"/my groups/cpu.max": "100000 100000"}
    assert cpu_quota(write_files(tmp_path, files)) == 1.0


@pytest.mark.parametrize("text", ["", "max", "100000", "a b", "-5 100000", "100000 0", "1 2 3", "\x00\xff"])
def test_malformed_quotas_are_ignored(text: str, tmp_path: Path) -> None:
    root = write_files(tmp_path, cpus(4) | v2("/", {"cpu.max": text}))
    assert limit(root, 4) == CoreLimit(4, "all 4 cores")


@pytest.mark.parametrize("name", ["/proc/self/cgroup", "/proc/self/mountinfo"])
@pytest.mark.parametrize("text", ["", ":::", "0:", "a b c - cgroup2", "x" * 10_000, "1 2 3 4 5 6 - cgroup2 c rw"])
def test_malformed_files_of_proc_do_not_fail(name: str, text: str, tmp_path: Path) -> None:
    root = write_files(tmp_path, cpus(4) | v2("/", {"cpu.max": "200000 100000"}) | {name: text})
    assert limit(root, 4).cores in (2, 4)


def test_malformed_lists_of_cpus_are_ignored(tmp_path: Path) -> None:
    for text in ("", "a", "3-", "-3", "0-99999999999", "0,,1", "1;2"):
        assert cpu_list(text) == set()
    assert cpu_list("0-2,5,7-7\n") == {0, 1, 2, 5, 7}
    files = cpus(4) | {"/sys/devices/system/cpu/cpu1/topology/thread_siblings_list": "?"}
    assert limit(write_files(tmp_path, files), 4).cores == 4


# -- this machine ------------------------------------------------------------------------------------------------------


def test_the_limit_of_this_process_is_read_once_and_is_the_default() -> None:
    assert core_limit() is core_limit()
    assert hardware.usable_cores() == hardware.fingerprint()["cores"] == core_limit().cores == read_core_limit().cores
    assert 1 <= core_limit().cores <= (os.cpu_count() or 1) and core_limit().reason


@pytest.mark.skipif(shutil.which("taskset") is None or (os.cpu_count() or 1) < 2, reason="needs taskset and two CPUs")
def test_taskset_limits_this_process() -> None:
    cpu = min(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(cpu), sys.executable, "-c", PROGRAM]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_quota_of_a_real_group_limits_this_process() -> None:
    if (os.cpu_count() or 1) < 2 or not os.access(V1_ROOT / "cgroup.procs", os.W_OK):
        pytest.skip("needs two CPUs and a writable hierarchy of cgroups 1")
    group = V1_ROOT / f"specplug-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("100000")
        script = f'echo $$ > {group}/cgroup.procs; exec "{sys.executable}" -c "$0"'
        done = subprocess.run(["sh", "-c", script, PROGRAM], capture_output=True, text=True, check=True)
        assert done.stdout == "1\n"
    finally:
        group.rmdir()


def test_busy_cores_are_a_part_of_the_usable_ones() -> None:
    assert 0 <= hardware.busy_cores() <= hardware.usable_cores()
