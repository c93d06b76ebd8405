"""The scheduler: order of answers, limits, cancellation and failures, on a toy loop and a clock that the test sets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_serving import END, ToyLoop, ToySampler, ToyStream

pytest.importorskip("fastapi")

from specplug.core import int_array
from specplug.errors import SpecplugError
from specplug.generation.answers import Sampling
from specplug.server.error_responses import error_response
from specplug.server.jobs import Delta, Job
from specplug.server.scheduler import AnswerFailed, DeadlinePassed, EngineFailed, QueueFull, Scheduler


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_scheduler(slots: int = 2, kv_tokens: int = 1000, queue_limit: int = 8) -> tuple[Scheduler, ToyLoop, Clock]:
    loop, clock = ToyLoop(), Clock()
    scheduler = Scheduler(
        loop,
        slots=slots,
        kv_tokens=kv_tokens,
        queue_limit=queue_limit,
        piece=lambda token: b"" if token == END else bytes([token]),
        end_tokens=frozenset({END}),
        clock=clock,
    )
    return scheduler, loop, clock


def job(text: str, max_tokens: int = 100, max_draft: int = 0, **fields: object) -> Job:
    prompt = int_array(list(text.encode()))
    return Job(prompt, ToySampler(Sampling()), max_tokens, max_draft, **fields)  # type: ignore[arg-type]


def run(scheduler: Scheduler, steps: int = 1000) -> list[tuple[Job, Delta]]:
    """The deltas of up to `steps` steps; stops early when there is no work left."""
    deltas = []
    for _ in range(steps):
        if not scheduler.has_work:
            break
        deltas += scheduler.step()
    return deltas


def text_of(one: Job, deltas: list[tuple[Job, Delta]]) -> str:
    return "".join(segment.text for other, delta in deltas if other is one for segment in delta.segments)


def test_each_job_gets_its_own_answer() -> None:
    scheduler, loop, _ = make_scheduler()
    jobs = [job(f"answer number {n}", max_draft=n % 2) for n in range(9)]
    scheduler.submit(jobs)
    deltas = run(scheduler)
    for one in jobs:
        assert text_of(one, deltas) == bytes(one.prompt.tolist()).decode()
        last = [delta for other, delta in deltas if other is one][-1]
        assert last.finish == "stop" and last.report is not None
        assert last.report.completion_tokens == len(one.prompt) + 1
    assert loop.open == 0 and not any(one.sampler.open for one in jobs)  # type: ignore[attr-defined]


def test_first_come_first_served() -> None:
    scheduler, loop, _ = make_scheduler(slots=2, queue_limit=20)
    names = [f"job {n}" for n in range(12)]
    for name in names:
        scheduler.submit([job(name)])
    run(scheduler)
    assert loop.begun == names


def test_a_job_waits_until_its_tokens_fit_and_is_not_overtaken() -> None:
    scheduler, loop, _ = make_scheduler(slots=4, kv_tokens=100)
    first, large, small = job("a" * 10, 50), job("b" * 10, 60), job("c", 1)
    scheduler.submit([first, large, small])
    scheduler.step()
    assert loop.begun == ["a" * 10] and scheduler.waiting == 2
    run(scheduler)
    assert [name[0] for name in loop.begun] == ["a", "b", "c"]


def test_a_full_queue_refuses_jobs_and_accepts_all_jobs_of_a_request_or_none() -> None:
    scheduler, _, _ = make_scheduler(slots=2, queue_limit=3)
    scheduler.submit([job("a") for _ in range(4)])
    with pytest.raises(QueueFull) as full:
        scheduler.submit([job("b"), job("c")])
    assert 1 <= full.value.retry_after_s <= 60
    assert scheduler.waiting == 4
    scheduler.submit([job("d")])
    with pytest.raises(QueueFull):
        scheduler.submit([job("e")])


def test_cancelled_jobs_are_removed_before_the_next_pass() -> None:
    scheduler, loop, _ = make_scheduler(slots=1)
    running, waiting = job("x" * 50), job("y" * 50)
    scheduler.submit([running, waiting])
    run(scheduler, 3)
    assert loop.open == 1
    running.cancelled = waiting.cancelled = True
    before = loop.steps
    assert scheduler.step() == []
    assert (loop.open, loop.steps, scheduler.has_work) == (0, before, False)
    assert not running.sampler.open and not waiting.sampler.open  # type: ignore[attr-defined]


def test_a_passed_deadline_ends_a_running_answer_early_and_a_queued_one_with_an_error() -> None:
    scheduler, loop, clock = make_scheduler(slots=1)
    running, waiting = job("abcdef" * 9, deadline=5.0), job("late", deadline=5.0)
    scheduler.submit([running, waiting])
    deltas = run(scheduler, 4)
    clock.now = 5.0
    deltas += scheduler.step()
    assert text_of(running, deltas) == "abcd"
    last = dict(deltas)[running]
    assert last.finish == "length" and last.report is not None and last.report.deadline_passed
    assert isinstance(dict(deltas)[waiting].error, DeadlinePassed)
    assert not scheduler.has_work and loop.open == 0


def test_a_failed_pass_ends_the_running_jobs_only() -> None:
    scheduler, loop, _ = make_scheduler(slots=1)
    lost, next_one = job("lost"), job("next")
    scheduler.submit([lost, next_one])
    scheduler.step()
    loop.fail = SpecplugError("the cache is gone")
    deltas = run(scheduler)
    assert isinstance(dict(deltas)[lost].error, EngineFailed)
    assert text_of(next_one, deltas) == "next"
    assert loop.resets == 1 and loop.open == 0


def test_a_failed_answer_ends_alone_with_a_status_of_the_server() -> None:
    scheduler, loop, _ = make_scheduler(slots=2)
    lost, other = job("lost"), job("other")
    scheduler.submit([lost, other])
    deltas = scheduler.step()
    assert isinstance(lost.stream, ToyStream)
    lost.stream.failure = SpecplugError("the constraint is too complex")
    deltas += run(scheduler)
    error = dict(deltas)[lost].error
    assert isinstance(error, AnswerFailed)
    status, body, _ = error_response(error)
    assert (status, body["error"]["code"]) == (500, "answer_failed")
    assert text_of(other, deltas) == "other" and loop.open == 0


def test_a_stop_string_ends_the_answer_at_once() -> None:
    scheduler, loop, _ = make_scheduler()
    one = job("hello STOP and more", max_draft=1, stop=("STOP",))
    scheduler.submit([one])
    deltas = run(scheduler)
    assert text_of(one, deltas) == "hello "
    assert deltas[-1][1].finish == "stop" and loop.steps < 8


def test_a_prompt_waits_for_the_prefill_of_an_equal_one() -> None:
    scheduler, loop, _ = make_scheduler(slots=2)
    loop.prefixes_shared = True
    scheduler.submit([job("same"), job("same")])
    scheduler.step()
    assert loop.begun == ["same"]
    scheduler.step()
    assert loop.begun == ["same", "same"]


def test_segments_hold_complete_characters() -> None:
    scheduler, _, _ = make_scheduler()
    one = job("é€😀")
    scheduler.submit([one])
    texts = [segment.text for _, delta in run(scheduler) for segment in delta.segments]
    assert texts == ["é", "€", "😀"]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 4), st.integers(1, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("fail"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@given(EVENTS)
def test_under_any_events_each_job_gets_its_own_answer_or_an_error(events: list[tuple[str, int, int]]) -> None:
    scheduler, loop, _ = make_scheduler(slots=3, kv_tokens=60, queue_limit=6)
    jobs: list[Job] = []
    deltas: list[tuple[Job, Delta]] = []
    for event, one, other in events:
        if event == "submit":
            new = [job(f"{len(jobs)}:{n}" + "x" * other, max_tokens=20, max_draft=n % 2) for n in range(one)]
            try:
                scheduler.submit(new)
            except QueueFull:
                continue
            jobs += new
        elif event == "cancel" and jobs:
            jobs[one % len(jobs)].cancelled = True
        elif event == "step":
            deltas += run(scheduler, one)
        elif event == "fail":
            loop.fail = SpecplugError("no")
        assert loop.open == len(scheduler.active) <= 3
        assert sum(one.reserved_tokens for one in scheduler.active) <= 60
    deltas += run(scheduler)
    for one in jobs:
        last = [delta for other, delta in deltas if other is one and delta.is_last]
        assert len(last) <= 1 and (last or one.cancelled)
        expected = bytes(one.prompt.tolist()).decode()
        if last and last[0].finish:
            assert text_of(one, deltas) == expected
        else:
            assert expected.startswith(text_of(one, deltas))
        assert not one.sampler.open  # type: ignore[attr-defined]
    assert loop.open == 0
