"""When the worker hands deltas to the event loop, on a clock that the scheduler's steps advance."""

import asyncio

import pytest
from toy_serving import ToySampler

pytest.importorskip("fastapi")

from specplug.core import int_array
from specplug.generation.answers import Sampling
from specplug.server import worker
from specplug.server.jobs import Delta, Job
from specplug.server.worker import MAX_HOLD_S, Worker

STEPS = 20


class TimedScheduler:
    """A scheduler with STEPS steps; each takes `seconds` and yields one token per job."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.left = seconds, 100.0, 0
        self.jobs: list[Job] = []

    @property
    def has_work(self) -> bool:
        return self.left > 0

    def submit(self, jobs: list[Job]) -> None:
        self.jobs, self.left = jobs, STEPS

    def step(self) -> list[tuple[Job, Delta]]:
        self.now += self.seconds
        self.left -= 1
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
