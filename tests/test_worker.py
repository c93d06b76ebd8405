"""When the engine's thread hands over what came, on a clock that its steps move."""

import asyncio

import pytest
from toy_serving import ToySampler

pytest.importorskip("fastapi")

from specplug.core import int_array
from specplug.generation.answers import Sampling
from specplug.server import worker
from specplug.server.jobs import Delta, Job
from specplug.server.worker import HELD_S, Worker

STEPS = 20


class Paced:
    """A scheduler whose steps take `seconds` and bring one token for each job, STEPS times."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.left = seconds, 100.0, 0
        self.jobs: list[Job] = []

    @property
    def work(self) -> bool:
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
    """Tokens in each of the first job's handovers."""
    paced = Paced(seconds)
    monkeypatch.setattr(worker, "monotonic", lambda: paced.now)

    async def collect() -> list[list[int]]:
        own = Worker(paced, lambda deltas: None)  # type: ignore[arg-type]
        jobs = [Job(int_array([1]), ToySampler(Sampling()), STEPS, 0, streamed=each) for each in streamed]
        mailbox = own.submit(jobs)
        own.start()
        found, ended = [], 0
        while ended < len(jobs):
            job, delta = await mailbox.get()
            ended += bool(delta.finish)
            if job is jobs[0]:
                found.append(delta.tokens)
        await own.stop()
        return found

    return asyncio.run(collect())


def test_pieces_of_fast_streams_are_held_and_those_of_slow_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 5 ms: after three further ones another would end 20 ms after the last handover."""
    assert HELD_S == 0.02
    fast = handed_over(monkeypatch, 0.005, True)
    assert [len(tokens) for tokens in fast] == [1, 4, 4, 4, 4, 3]
    assert [token for tokens in fast for token in tokens] == list(range(STEPS))[::-1]
    assert [len(tokens) for tokens in handed_over(monkeypatch, 0.03, True)] == [1] * STEPS


def test_a_whole_answer_is_handed_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(tokens) for tokens in handed_over(monkeypatch, 0.03, False)] == [STEPS]


def test_what_nobody_waits_for_goes_with_what_somebody_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(tokens) for tokens in handed_over(monkeypatch, 0.03, False, True)] == [1] * STEPS
