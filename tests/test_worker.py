"""The worker: changes between steps, and when it hands over deltas, on a clock that the scheduler's steps advance."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from toy_serving import ToySampler

pytest.importorskip("fastapi")

from specplug.core import int_array
from specplug.generation.answers import Sampling
from specplug.server import worker
from specplug.server.jobs import Delta, Job
from specplug.server.worker import MAX_HOLD_S, ShuttingDown, Worker

STEPS = 20


class TimedScheduler:
    """A scheduler with STEPS steps; each takes `seconds` and yields one token per job."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.left = seconds, 100.0, 0
        self.jobs: list[Job] = []
        self.record_step: Callable[[bool], None] = lambda begins: None
        """Receives True when a step begins and False when it ends."""

    @property
    def has_work(self) -> bool:
        return self.left > 0

    def submit(self, jobs: list[Job]) -> None:
        self.jobs, self.left = jobs, STEPS

    def step(self) -> list[tuple[Job, Delta]]:
        self.record_step(True)
        self.now += self.seconds
        self.left -= 1
        self.record_step(False)
        return [(job, Delta(tokens=[self.left], finish="" if self.left else "stop")) for job in self.jobs]

    def drop_all(self) -> None:
        self.left = 0


def handed_over(monkeypatch: pytest.MonkeyPatch, seconds: float, *streamed: bool) -> list[list[int]]:
    """The first job's tokens, one list per handover. There is one job per entry of `streamed`."""
    scheduler = TimedScheduler(seconds)
    monkeypatch.setattr(worker, "monotonic", lambda: scheduler.now)

    async def collect() -> list[list[int]]:
        started = Worker(scheduler, lambda deltas: None)  # type: ignore[arg-type]
        jobs = [Job(int_array([1]), ToySampler(Sampling()), STEPS, 0, streamed=each) for each in streamed]
        mailbox = started.submit(jobs)
        started.start()
        found, ended = [], 0
        while ended < len(jobs):
            job, delta = await mailbox.get()
            ended += bool(delta.finish)
            if job is jobs[0]:
                found.append(delta.tokens)
        await started.stop()
        return found

    return asyncio.run(collect())


def test_deltas_of_fast_streams_are_held_back_and_those_of_slow_streams_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With steps of 5 ms, four steps end within 20 ms of the last handover."""
    assert MAX_HOLD_S == 0.02
    fast = handed_over(monkeypatch, 0.005, True)
    assert [len(tokens) for tokens in fast] == [1, 4, 4, 4, 4, 3]
    assert [token for tokens in fast for token in tokens] == list(range(STEPS))[::-1]
    assert [len(tokens) for tokens in handed_over(monkeypatch, 0.03, True)] == [1] * STEPS


def test_an_answer_that_is_not_streamed_is_handed_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(tokens) for tokens in handed_over(monkeypatch, 0.03, False)] == [STEPS]


def test_deltas_without_a_streaming_client_go_with_those_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(tokens) for tokens in handed_over(monkeypatch, 0.03, False, True)] == [1] * STEPS


# -- changes between steps --------------------------------------------------------------------------------------------


def test_a_change_runs_in_the_engines_thread_beside_work_and_without() -> None:
    async def change_twice() -> None:
        scheduler = TimedScheduler(0.01)
        started = Worker(scheduler, lambda deltas: None)  # type: ignore[arg-type]
        started.start()
        assert await started.between_steps(lambda: threading.current_thread().name) == "specplug-engine"
        inside: list[bool] = []
        scheduler.record_step = inside.append
        started.submit([Job(int_array([1]), ToySampler(Sampling()), STEPS, 0)])
        assert await started.between_steps(lambda: inside[-1:]) in ([], [False])
        await started.stop()

    asyncio.run(change_twice())


def test_an_exception_of_a_change_is_raised_where_it_was_asked_for() -> None:
    async def fail() -> None:
        started = Worker(TimedScheduler(0.01), lambda deltas: None)  # type: ignore[arg-type]
        started.start()
        with pytest.raises(ZeroDivisionError):
            await started.between_steps(lambda: 1 // 0)
        assert started.alive and await started.between_steps(lambda: 5) == 5
        await started.stop()

    asyncio.run(fail())


def test_no_change_is_lost_when_the_thread_ends() -> None:
    async def stop() -> None:
        started = Worker(TimedScheduler(0.01), lambda deltas: None)  # type: ignore[arg-type]
        with pytest.raises(ShuttingDown):
            await started.between_steps(lambda: 5)
        started.start()
        held = threading.Event()
        waiting = [asyncio.create_task(started.between_steps(held.wait))]
        waiting += [asyncio.create_task(started.between_steps(lambda: True)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        stopping = asyncio.create_task(started.stop())
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            await started.between_steps(lambda: 5)
        held.set()
        await stopping
        assert [await task for task in (waiting[0], *waiting[2:])] == [True] * 3

    asyncio.run(stop())
