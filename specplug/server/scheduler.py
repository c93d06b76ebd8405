"""Who is answered when: first come, first served, as far as slots and cache reach, many at a time.

Knows jobs, slots and the clock. Knows no engine, no thread but that others submit and cancel, and no HTTP.
Order: a job starts when every earlier one has started and its tokens fit. A prompt that begins as one being read does
waits for that one. A cancelled or late job is gone before the next pass.
Keeps: the waiting jobs, at most `queue_limit`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from time import monotonic
from typing import Any, Protocol

from specplug.core import IntArray
from specplug.errors import SpecplugError
from specplug.server.jobs import Delta, Job, Report

SMOOTHING = 0.1
"""Weight of a new answer in the running mean of what one takes."""

LONGEST_WAIT_S = 60
"""The most that a client is told to wait before it asks again."""


class Loop(Protocol):
    """What is asked of an engine: `specplug.engines.llama_cpp.step_loop.StepLoop` is one."""

    def begin(self, prompt: IntArray, sampler: Any, max_tokens: int, max_draft: int) -> Any: ...

    def step(self, running: Sequence[Any], reading: Sequence[Any]) -> None: ...

    def shares_more_later(self, prompt: IntArray, reading: Sequence[Any]) -> bool: ...

    def finish(self, stream: Any) -> None: ...

    def reset(self) -> None: ...


class QueueFull(SpecplugError):
    """Ask again in `retry_after_s` seconds."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} answers are waiting already; ask again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Late(SpecplugError):
    """The deadline passed before the answer began."""


class EngineFailed(SpecplugError):
    """A pass failed; everything in it is lost."""


class Scheduler:
    """Call `step` again and again from one thread, as long as there is `work`."""

    def __init__(
        self,
        loop: Loop,
        *,
        slots: int,
        kv_tokens: int,
        queue_limit: int,
        piece: Callable[[int], bytes],
        end_tokens: frozenset[int],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """kv_tokens  that all answers under way may come to hold; piece  what a token prints"""
        self.loop = loop
        self.slots = slots
        self.kv_tokens = kv_tokens
        self.queue_limit = queue_limit
        self.clock = clock
        self.active: list[Job] = []
        self._piece = piece
        self._end_tokens = end_tokens
        self._waiting: deque[Job] = deque()
        self._lock = threading.Lock()  # of what waits
        self._job_s = 1.0

    # -- asked from any thread ------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def work(self) -> bool:
        return bool(self._waiting or self.active)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait, all or none. Raises QueueFull."""
        with self._lock:
            waiting = len(self._waiting) + len(self.active)
            if waiting + len(jobs) > self.slots + self.queue_limit:
                seconds = ceil(self._job_s * (1 + waiting) / self.slots)
                raise QueueFull(len(self._waiting), min(max(1, seconds), LONGEST_WAIT_S))
            for job in jobs:
                job.submitted = self.clock()
                self._waiting.append(job)

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[Job, Delta]]:
        """One pass for everyone under way; what it brought. A job's last Delta has `finish` or `error`."""
        deltas = self._sweep()
        self._admit()
        running = [job for job in self.active if job.stream is not None and not job.stream.reading]
        reading = [job for job in self.active if job.stream is not None and job.stream.reading]
        if not self.active:
            return deltas
        try:
            self.loop.step([job.stream for job in running], [job.stream for job in reading])
        except SpecplugError as error:
            return deltas + self.fail_all(error)
        for job in running + reading:
            assert job.stream is not None
            if not job.stream.reading:
                deltas.append((job, self._take(job)))
        return deltas

    def fail_all(self, error: SpecplugError) -> list[tuple[Job, Delta]]:
        """Everyone under way is told, and the engine starts from nothing; those that wait still come."""
        lost = [(job, Delta(error=EngineFailed(str(error)))) for job in self.active]
        for job, _ in lost:
            self._leave(job)
        self.loop.reset()
        return lost

    def drop_all(self) -> None:
        """Everyone goes, those that wait as well, and nobody is told."""
        with self._lock:
            self._discard(self._waiting)
            self._waiting.clear()
        for job in list(self.active):
            self._leave(job)

    # -- parts of a step ------------------------------------------------------------------------------------------

    def _sweep(self) -> list[tuple[Job, Delta]]:
        """Cancelled and late jobs go."""
        now = self.clock()
        with self._lock:
            gone = [job for job in self._waiting if job.cancelled or _is_late(job, now)]
            if gone:
                self._waiting = deque(job for job in self._waiting if job not in gone)
        self._discard(gone)
        deltas: list[tuple[Job, Delta]] = [
            (job, Delta(error=Late("the deadline passed while the request waited; give it more time, or ask later")))
            for job in gone
            if not job.cancelled
        ]
        for job in [job for job in self.active if job.cancelled or _is_late(job, now)]:
            if not job.cancelled:
                if job.emitted:
                    deltas.append((job, Delta(job.text.close(), finish="length", report=self._report(job, late=True))))
                else:
                    deltas.append((job, Delta(error=Late("the deadline passed while the prompt was read"))))
            self._leave(job)
        return deltas

    def _admit(self) -> None:
        """Jobs start in order, until one does not fit."""
        held = sum(job.reserved_tokens for job in self.active)
        while len(self.active) < self.slots:
            with self._lock:
                if not self._waiting or held + self._waiting[0].reserved_tokens > self.kv_tokens:
                    return
                job = self._waiting[0]
                reading = [other.stream for other in self.active if other.stream is not None and other.stream.reading]
                if self.loop.shares_more_later(job.prompt, reading):
                    return
                self._waiting.popleft()
                self.active.append(job)
            job.started = self.clock()
            job.stream = self.loop.begin(job.prompt, job.sampler, job.max_tokens, job.max_draft)
            held += job.reserved_tokens

    def _take(self, job: Job) -> Delta:
        """Turn what a stream emitted into text; the job leaves with its last token."""
        stream = job.stream
        assert stream is not None
        if stream.failure is not None:
            self._leave(job)
            return Delta(error=stream.failure)
        if not job.emitted:
            job.first = self.clock()
        fresh, sources = stream.fresh, [*stream.guessers, None]
        segments, count = [], 0
        for token, source in zip(fresh, sources, strict=True):
            count += 1
            if token not in self._end_tokens:
                segments += job.text.feed(self._piece(token), source is not None, source)
            if job.text.stopped:
                break
        job.emitted += count
        finish = "stop" if job.text.stopped else stream.finish or ""
        report = None
        if finish:
            segments += job.text.close()
            report = self._report(job)
            self._job_s += (self.clock() - job.started - self._job_s) * SMOOTHING
            self._leave(job)
        return Delta(segments, fresh[:count], stream.logprobs[:count], finish, report)

    def _report(self, job: Job, late: bool = False) -> Report:
        assert job.stream is not None
        now = self.clock()
        return Report(
            len(job.prompt),
            job.stream.cached,
            job.stream.counters,
            job.emitted,
            queued_ms=(job.started - job.submitted) * 1000,
            prompt_ms=(job.first - job.started) * 1000,
            decode_ms=(now - job.first) * 1000,
            step_ms=job.stream.decode_ms,
            plain_ms=job.stream.plain_ms,
            late=late,
        )

    def _leave(self, job: Job) -> None:
        self.active.remove(job)
        if job.stream is not None:
            self.loop.finish(job.stream)
        else:
            job.sampler.close()

    def _discard(self, jobs: Iterable[Job]) -> None:
        """Jobs that never began still own their samplers."""
        for job in jobs:
            job.sampler.close()


def _is_late(job: Job, now: float) -> bool:
    return job.deadline is not None and now >= job.deadline
