"""Who is answered when, on a toy loop and a clock that only the test moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_serving import END, ToyLoop, ToySampler

pytest.importorskip("fastapi")

from specplug.core import int_array
from specplug.errors import SpecplugError
from specplug.generation.answers import Sampling
from specplug.server.jobs import Delta, Job
from specplug.server.scheduler import EngineFailed, Late, QueueFull, Scheduler


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def made(slots: int = 2, kv_tokens: int = 1000, queue_limit: int = 8) -> tuple[Scheduler, ToyLoop, Clock]:
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


def job(text: str, max_tokens: int = 100, max_draft: int = 0, **further: object) -> Job:
    prompt = int_array(list(text.encode()))
    return Job(prompt, ToySampler(Sampling()), max_tokens, max_draft, **further)  # type: ignore[arg-type]


def run(scheduler: Scheduler, steps: int = 1000) -> list[tuple[Job, Delta]]:
    """Deltas of so many steps, or until nothing is left to do."""
    found = []
    for _ in range(steps):
        if not scheduler.work:
            break
        found += scheduler.step()
    return found


def text_of(one: Job, deltas: list[tuple[Job, Delta]]) -> str:
    return "".join(segment.text for other, delta in deltas if other is one for segment in delta.segments)


def test_everyone_gets_an_own_answer() -> None:
    scheduler, loop, _ = made()
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
    scheduler, loop, _ = made(slots=2, queue_limit=20)
    names = [f"job {n}" for n in range(12)]
    for name in names:
        scheduler.submit([job(name)])
    run(scheduler)
    assert loop.begun == names


def test_a_job_waits_until_its_tokens_fit_and_is_not_overtaken() -> None:
    scheduler, loop, _ = made(slots=4, kv_tokens=100)
    first, large, small = job("a" * 10, 50), job("b" * 10, 60), job("c", 1)
    scheduler.submit([first, large, small])
    scheduler.step()
    assert loop.begun == ["a" * 10] and scheduler.waiting == 2
    run(scheduler)
    assert [name[0] for name in loop.begun] == ["a", "b", "c"]


def test_beyond_the_queue_limit_nobody_is_let_in_and_all_or_none_of_a_request() -> None:
    scheduler, _, _ = made(slots=2, queue_limit=3)
    scheduler.submit([job("a") for _ in range(4)])
    with pytest.raises(QueueFull) as full:
        scheduler.submit([job("b"), job("c")])
    assert 1 <= full.value.retry_after_s <= 60
    assert scheduler.waiting == 4
    scheduler.submit([job("d")])
    with pytest.raises(QueueFull):
        scheduler.submit([job("e")])


def test_what_is_cancelled_is_gone_before_the_next_pass() -> None:
    scheduler, loop, _ = made(slots=1)
    running, waiting = job("x" * 50), job("y" * 50)
    scheduler.submit([running, waiting])
    run(scheduler, 3)
    assert loop.open == 1
    running.cancelled = waiting.cancelled = True
    before = loop.steps
    assert scheduler.step() == []
    assert (loop.open, loop.steps, scheduler.work) == (0, before, False)
    assert not running.sampler.open and not waiting.sampler.open  # type: ignore[attr-defined]


def test_late_jobs_end_with_what_they_have_or_with_an_error() -> None:
    scheduler, loop, clock = made(slots=1)
    running, waiting = job("abcdef" * 9, deadline=5.0), job("late", deadline=5.0)
    scheduler.submit([running, waiting])
    deltas = run(scheduler, 4)
    clock.now = 5.0
    deltas += scheduler.step()
    assert text_of(running, deltas) == "abcd"
    last = dict(deltas)[running]
    assert last.finish == "length" and last.report is not None and last.report.late
    assert isinstance(dict(deltas)[waiting].error, Late)
    assert not scheduler.work and loop.open == 0


def test_a_pass_that_fails_takes_those_in_it_and_no_one_else() -> None:
    scheduler, loop, _ = made(slots=1)
    lost, next_one = job("lost"), job("next")
    scheduler.submit([lost, next_one])
    scheduler.step()
    loop.fail = SpecplugError("the cache is gone")
    deltas = run(scheduler)
    assert isinstance(dict(deltas)[lost].error, EngineFailed)
    assert text_of(next_one, deltas) == "next"
    assert loop.resets == 1 and loop.open == 0


def test_a_stop_string_ends_at_once() -> None:
    scheduler, loop, _ = made()
    one = job("hello STOP and more", max_draft=1, stop=("STOP",))
    scheduler.submit([one])
    deltas = run(scheduler)
    assert text_of(one, deltas) == "hello "
    assert deltas[-1][1].finish == "stop" and loop.steps < 8


def test_a_prompt_that_is_just_being_read_is_waited_for() -> None:
    scheduler, loop, _ = made(slots=2)
    loop.alike = True
    scheduler.submit([job("same"), job("same")])
    scheduler.step()
    assert loop.begun == ["same"]
    scheduler.step()
    assert loop.begun == ["same", "same"]


def test_characters_are_whole() -> None:
    scheduler, _, _ = made()
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
def test_whatever_happens_everyone_gets_the_own_answer_or_is_told(events: list[tuple[str, int, int]]) -> None:
    scheduler, loop, _ = made(slots=3, kv_tokens=60, queue_limit=6)
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
        own = [delta for other, delta in deltas if other is one]
        ends = [delta for delta in own if delta.finish or delta.error]
        assert len(ends) <= 1 and (ends or one.cancelled)
        said = bytes(one.prompt.tolist()).decode()
        if ends and ends[0].finish:
            assert text_of(one, deltas) == said
        else:
            assert said.startswith(text_of(one, deltas))
        assert not one.sampler.open  # type: ignore[attr-defined]
    assert loop.open == 0
