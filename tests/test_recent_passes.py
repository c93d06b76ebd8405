"""The figures of the last minute, from invented passes: what is compared with what, and what is forgotten."""

from types import SimpleNamespace
from typing import Any

import pytest

from specplug.core import int_array
from specplug.generation.counters import Counters
from specplug.server.jobs import Job
from specplug.server.recent_passes import RecentPasses

MS = 1_000_000  # nanoseconds


class Answers:
    """Answers that run together; each pass is charged to them in equal shares, as the step loop does."""

    def __init__(self, passes: RecentPasses, number: int = 1) -> None:
        self.passes = passes
        sampler: Any = None
        self.jobs = [Job(int_array([1]), sampler, max_tokens=1000, max_draft=10) for _ in range(number)]
        for job in self.jobs:
            stream: Any = SimpleNamespace(counters=Counters())
            job.stream = stream
        passes.record(0.0, self.jobs, with_prompt=True)

    def run(self, now: float, times: int, *, ms: float, drafted: int = 0, with_prompt: bool = False) -> None:
        """`times` passes in which each answer verifies and accepts `drafted` tokens; drafting takes 1 ms more."""
        for _ in range(times):
            for job in self.jobs:
                assert job.stream is not None
                counters = job.stream.counters
                counters.steps += 1
                counters.emitted_tokens += 1 + drafted
                counters.draft_tokens += drafted
                counters.accepted_tokens += drafted
                counters.target_ns += int(ms * MS) // len(self.jobs)
                counters.draft_ns += (MS if drafted else 0) // len(self.jobs)
            self.passes.record(now, self.jobs, with_prompt=with_prompt)


def test_the_saving_is_the_time_of_plain_passes_over_the_time_that_was_taken() -> None:
    passes = RecentPasses()
    answer = Answers(passes)
    answer.run(10.0, 5, ms=10)
    answer.run(11.0, 10, ms=14, drafted=1)
    found = passes.snapshot(12.0)
    # 25 tokens of 10 ms each without drafting; 5 passes of 10 ms and 10 of 14 + 1 ms were made
    assert found["saved_by_drafting"] == pytest.approx(250 / 200, abs=5e-4)
    assert (found["plain_ms"], found["compared_ms"]) == (250.0, 200.0)
    assert (found["passes"], found["plain_passes"], found["tokens"]) == (15, 5, 25)
    assert (found["draft_tokens"], found["accepted_tokens"]) == (10, 10)


def test_passes_of_as_many_answers_are_compared() -> None:
    passes = RecentPasses()
    one, two = Answers(passes), Answers(passes, 2)
    one.run(1.0, 5, ms=10)
    two.run(2.0, 5, ms=12)
    two.run(3.0, 4, ms=20, drafted=2)
    # without drafting: 5 tokens in 50 ms, and (5 + 4 * 3) tokens of each of two answers in 12 ms per token
    assert passes.snapshot(4.0)["saved_by_drafting"] == pytest.approx((50 + 17 * 12) / (50 + 60 + 84), abs=5e-4)


def test_nothing_is_compared_without_plain_passes_of_the_last_minute() -> None:
    passes = RecentPasses()
    answer = Answers(passes)
    answer.run(0.0, 50, ms=10)
    answer.run(100.0, 20, ms=5, drafted=1)
    answer.run(100.0, 3, ms=10)
    found = passes.snapshot(101.0)
    assert found["saved_by_drafting"] is None and found["plain_passes"] == 3
    answer.run(102.0, 1, ms=10)
    assert passes.snapshot(102.0)["saved_by_drafting"] == pytest.approx((40 + 4) * 10 / (20 * 6 + 4 * 10), abs=5e-4)


def test_plain_passes_after_plain_ones_count_where_there_are_enough() -> None:
    passes = RecentPasses()
    answer = Answers(passes)
    for _ in range(4):
        answer.run(1.0, 1, ms=12, drafted=1)
        answer.run(1.0, 1, ms=11)  # a pass of another shape than the one before takes longer
    mixed = passes.snapshot(1.0)["saved_by_drafting"]
    assert mixed == pytest.approx(12 * 11 / (4 * 13 + 4 * 11), abs=5e-4)
    answer.run(2.0, 4, ms=10)
    assert passes.snapshot(2.0)["saved_by_drafting"] == pytest.approx(16 * 10 / (4 * 13 + 4 * 11 + 40), abs=5e-4)


def test_passes_with_prompts_are_left_out_and_plain_decoding_saves_nothing() -> None:
    passes = RecentPasses()
    answer = Answers(passes)
    answer.run(1.0, 5, ms=10)
    answer.run(1.0, 5, ms=90, with_prompt=True)
    found = passes.snapshot(1.0)
    assert found["passes"] == 5 and found["compared_ms"] == 50.0 and found["saved_by_drafting"] is None
    assert RecentPasses().snapshot(1.0)["passes"] == 0


def test_ended_answers_are_forgotten() -> None:
    passes = RecentPasses()
    answer = Answers(passes)
    answer.run(1.0, 5, ms=10)
    passes.forget(answer.jobs)
    answer.run(2.0, 1, ms=10)  # the first pass of an unknown answer is that of its prompt
    assert passes.snapshot(2.0)["passes"] == 5
