"""The free cores, and the threads that follow them, with invented readings."""

from collections.abc import Iterator, Sequence

import pytest

from specplug.engines.llama_cpp.thread_count import ThreadCount
from specplug.machine import free_cores
from specplug.machine.cores import allowed_cpus, online_cpus
from specplug.machine.free_cores import FreeCores


class Machine:
    """Counters that a test moves forward."""

    def __init__(self, waiting: int | None = 0) -> None:
        self.time, self.own, self.idle, self.waiting = 100.0, 0.0, 0.0, waiting

    def reader(self) -> FreeCores:
        return FreeCores(
            clock=lambda: self.time,
            own_seconds=lambda: self.own,
            idle_seconds=lambda: self.idle,
            waiting=lambda: self.waiting,
        )

    def pass_(self, seconds: float, own: float = 0.0, idle: float = 0.0) -> None:
        """`own` and `idle` cores during that time."""
        self.time += seconds
        self.own += own * seconds
        self.idle += idle * seconds


def test_the_first_reading_is_the_run_queue() -> None:
    assert Machine(waiting=0).reader().read() == len(online_cpus())
    assert Machine(waiting=1000).reader().read() == 0.0
    assert Machine(waiting=None).reader().read() is None


def test_readings_are_means_of_what_is_idle_and_what_is_ours() -> None:
    machine = Machine()
    reader = machine.reader()
    reader.read()
    machine.pass_(0.1, own=2.0)
    assert reader.read() is None, "too early"
    machine.pass_(0.2, own=1.25, idle=0.25)
    assert reader.read() == pytest.approx((0.2 + 0.25 + 0.05) / 0.3)


def test_after_a_pause_old_readings_do_not_count() -> None:
    machine = Machine(waiting=0)
    reader = machine.reader()
    reader.read()
    machine.pass_(60.0, idle=2.0)
    machine.waiting = 1000
    assert reader.read() == 0.0


def test_a_long_pass_is_no_pause() -> None:
    machine = Machine(waiting=1000)
    reader = machine.reader()
    reader.read()
    machine.pass_(5.0, own=1.5, idle=0.5)
    assert reader.read() == pytest.approx(2.0)


def test_the_real_counters_add_up() -> None:
    """What is idle and what is ours is at most all CPUs, here with tolerance for the steps of the counters."""
    reader = FreeCores()
    first = reader.read()
    assert first is None or 0.0 <= first <= len(allowed_cpus())
    end = free_cores.perf_counter() + 0.5
    while free_cores.perf_counter() < end:
        pass
    found = reader.read()
    assert found is not None
    assert 0.4 <= found <= len(allowed_cpus()) + 0.2, "this process alone had most of a core"


def counts(readings: Sequence[float | None], most: int = 4, share: float = 1.0) -> list[int]:
    values: Iterator[float | None] = iter(readings)
    count = ThreadCount(most, read=lambda: next(values), share=share)
    found = []
    for _ in readings:
        count.changed()
        found.append(count.now)
    return found


def test_threads_fall_at_once_and_rise_when_confirmed() -> None:
    assert counts([4.0, 2.2, 4.0, 4.0, None, 1.0]) == [4, 2, 2, 4, 4, 1]


def test_a_single_high_reading_changes_nothing() -> None:
    assert counts([1.0, 3.0, 1.0, 3.0, 3.0]) == [1, 1, 1, 1, 3]


def test_two_spinning_threads_on_two_cores_with_another_program() -> None:
    """Three threads share two cores: two thirds of them are the other program's, and one core is ours."""
    assert counts([2 * 2 / 3], most=2) == [1]


def test_a_light_load_takes_no_thread() -> None:
    assert counts([1.6], most=2) == [2]


def test_there_is_always_a_thread_and_never_one_too_many() -> None:
    assert counts([0.0, 9.0, 9.0]) == [1, 1, 4]


def test_free_logical_cores_count_by_the_share_of_the_physical_ones() -> None:
    """Four cores with two threads each, of which four logical ones are free."""
    assert counts([4.0], most=4, share=0.5) == [2]


def test_a_limit_below_the_number_of_cores_takes_nothing_from_free_ones() -> None:
    """As with --threads 2, or a quota of two cores on a machine of 64."""
    assert counts([32.0], most=2) == [2]


def test_one_thread_reads_nothing() -> None:
    def read() -> float:
        raise AssertionError

    assert not ThreadCount(1, read=read).changed()
