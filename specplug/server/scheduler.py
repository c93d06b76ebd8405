"""The order in which answers start and end: first come, first served, within the slots and the KV cache.

The scheduler does not depend on an engine, on threads (others only submit and cancel jobs from theirs) or on HTTP.
A job starts when every earlier job has started and its tokens fit into the KV cache. A job whose prompt shares a prefix
with a prompt that is being evaluated waits until that prefix is in the cache. Cancelled jobs and jobs past their
deadline are removed before the next step.
State: the queue, which holds at most `queue_limit` jobs beyond the free slots, and the running jobs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from time import monotonic
from typing import Any, Protocol

from specplug.core import IntArray, SequenceOptions
from specplug.errors import SpecplugError
from specplug.server.jobs import Delta, Job, Report

SMOOTHING = 0.1
"""Weight of the newest answer in the running mean of seconds per answer."""

MAX_RETRY_AFTER_S = 60
"""Largest value of the Retry-After header, in seconds."""


class Loop(Protocol):
    """The step loop of an engine; `specplug.engines.llama_cpp.step_loop.StepLoop` implements it.

    All methods are called from one thread.
    """

    def begin(self, prompt: IntArray, sampler: Any, max_tokens: int, max_draft: int, options: SequenceOptions) -> Any:
        """Start an answer and return its stream (see `jobs.Stream`).

        A slot must be free. The stream owns the sampler from now on. `prompt` is int32[n] with n >= 1.
        """

    def step(self, running: Sequence[Any], reading: Sequence[Any]) -> None:
        """Run one target pass: verify drafts for `running` streams, evaluate prompt tokens of `reading` streams.

        Afterwards each stream with `reading` False has new tokens in `fresh`, or a `failure`. Raises SpecplugError if
        the pass itself fails; then all streams are lost.
        """

    def shares_more_later(self, prompt: IntArray, reading: Sequence[Any]) -> bool:
        """True if a prompt should wait because a `reading` stream will soon have a longer prefix of it in the cache."""

    def finish(self, stream: Any) -> None:
        """End a stream, finished or not: close its sampler and free its slot."""

    def reset(self) -> None:
        """Clear the KV cache after a failed pass. No stream may be running."""


class QueueFull(SpecplugError):
    """The queue has no room; the client may retry after `retry_after_s` seconds."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"the queue is full: {waiting} answers are waiting; retry in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class DeadlinePassed(SpecplugError):
    """The deadline passed before the first token."""


class EngineFailed(SpecplugError):
    """A target pass failed, and with it every running answer."""


class AnswerFailed(SpecplugError):
    """One answer cannot go on, such as where its constraint allows no further token or becomes too complex.

    texts  what the answers to its request had by then, where these were not sent yet
    """

    texts: Sequence[str] = ()


class Scheduler:
    """Queues jobs and runs them. One thread calls `step` as long as `has_work` is True."""

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
        """kv_tokens  largest sum of `reserved_tokens` of the running jobs; piece  the bytes that a token prints"""
        self.loop = loop
        self.slots = slots
        self.kv_tokens = kv_tokens
        self.queue_limit = queue_limit
        self.clock = clock
        self.active: list[Job] = []
        self._piece = piece
        self._end_tokens = end_tokens
        self._queue: deque[Job] = deque()
        self._lock = threading.Lock()  # guards _queue
        self._mean_job_s = 1.0

    # -- called from any thread -----------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Number of queued jobs."""
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        return bool(self._queue or self.active)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs or none. Raises QueueFull."""
        with self._lock:
            waiting = len(self._queue) + len(self.active)
            if waiting + len(jobs) > self.slots + self.queue_limit:
                seconds = ceil(self._mean_job_s * (1 + waiting) / self.slots)
                raise QueueFull(len(self._queue), min(max(1, seconds), MAX_RETRY_AFTER_S))
            for job in jobs:
                job.submitted_s = self.clock()
                self._queue.append(job)

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[Job, Delta]]:
        """Run one target pass for all running jobs; returns a delta for each job that it advanced or ended."""
        deltas = self._remove_ended()
        self._start_queued()
        running = [job for job in self.active if job.stream is not None and not job.stream.reading]
        reading = [job for job in self.active if job.stream is not None and job.stream.reading]
        if not self.active:
            return deltas
        try:
            self.loop.step([job.stream for job in running], [job.stream for job in reading])
        except SpecplugError as error:
            return deltas + self.fail_running(error)
        for job in running + reading:
            assert job.stream is not None
            if not job.stream.reading:
                deltas.append((job, self._collect(job)))
        return deltas

    def fail_running(self, error: SpecplugError) -> list[tuple[Job, Delta]]:
        """End every running job with an error and reset the engine. Queued jobs stay queued."""
        lost = [(job, Delta(error=EngineFailed(str(error)))) for job in self.active]
        for job, _ in lost:
            self._end(job)
        self.loop.reset()
        return lost

    def drop_all(self) -> None:
        """Drop every running and queued job without a delta."""
        with self._lock:
            self._close_samplers(self._queue)
            self._queue.clear()
        for job in list(self.active):
            self._end(job)

    # -- parts of a step ------------------------------------------------------------------------------------------

    def _remove_ended(self) -> list[tuple[Job, Delta]]:
        """Remove cancelled jobs and jobs past their deadline, from the queue and from the slots."""
        now = self.clock()
        with self._lock:
            removed = [job for job in self._queue if job.cancelled or _is_late(job, now)]
            if removed:
                self._queue = deque(job for job in self._queue if job not in removed)
        self._close_samplers(removed)
        queued = "the deadline passed while the request was queued; set a later one, or retry later"
        deltas = [(job, Delta(error=DeadlinePassed(queued))) for job in removed if not job.cancelled]
        for job in [job for job in self.active if job.cancelled or _is_late(job, now)]:
            if not job.cancelled:
                if job.tokens:
                    report = self._report(job, deadline_passed=True)
                    deltas.append((job, Delta(job.text.close(), finish="length", report=report)))
                else:
                    reading = "the deadline passed while the prompt was evaluated; set a later one"
                    deltas.append((job, Delta(error=DeadlinePassed(reading))))
            self._end(job)
        return deltas

    def _start_queued(self) -> None:
        """Start queued jobs in order, up to the first that has to wait."""
        reserved = sum(job.reserved_tokens for job in self.active)
        while len(self.active) < self.slots:
            with self._lock:
                if not self._queue or reserved + self._queue[0].reserved_tokens > self.kv_tokens:
                    return
                job = self._queue[0]
                reading = [other.stream for other in self.active if other.stream is not None and other.stream.reading]
                if self.loop.shares_more_later(job.prompt, reading):
                    return
                self._queue.popleft()
                self.active.append(job)
            job.started_s = self.clock()
            job.slot = min(set(range(self.slots)) - {other.slot for other in self.active if other is not job})
            most = max(1, job.max_tokens)
            job.stream = self.loop.begin(job.prompt, job.sampler, most, job.max_draft, job.options)
            reserved += job.reserved_tokens

    def _collect(self, job: Job) -> Delta:
        """Turn the tokens that a stream emitted into a delta; end the job with its last token."""
        stream = job.stream
        assert stream is not None
        if stream.failure is not None:
            self._end(job)
            return Delta(error=AnswerFailed(str(stream.failure)))
        first = not job.tokens
        if first:
            job.first_token_s = self.clock()
        fresh, sources = (stream.fresh, [*stream.drafters, None]) if job.max_tokens else ([], [])
        segments, count = [], 0
        for token, source in zip(fresh, sources, strict=True):
            count += 1
            if token not in self._end_tokens and token not in job.stop_tokens:
                segments += job.text.feed(job.shown.get(token) or self._piece(token), source is not None, source)
            if job.text.stopped:
                break
        job.tokens += fresh[:count]
        finish = "stop" if job.text.stopped else (stream.finish or "") if job.max_tokens else "length"
        report = self._report(job) if finish or job.reports else None
        if finish:
            segments += job.text.close()
            self._mean_job_s += (self.clock() - job.started_s - self._mean_job_s) * SMOOTHING
            self._end(job)
        scores = stream.prompt_logprobs if first else []
        return Delta(segments, fresh[:count], stream.logprobs[:count], finish, report, scores)

    def _report(self, job: Job, deadline_passed: bool = False) -> Report:
        assert job.stream is not None
        now = self.clock()
        return Report(
            len(job.prompt),
            job.stream.cached,
            job.stream.counters,
            len(job.tokens),
            queued_ms=(job.started_s - job.submitted_s) * 1000,
            prompt_ms=(job.first_token_s - job.started_s) * 1000,
            decode_ms=(now - job.first_token_s) * 1000,
            step_ms=job.stream.decode_ms,
            plain_ms=job.stream.plain_ms,
            deadline_passed=deadline_passed,
            stop_string=job.text.stop_string or job.stop_tokens.get(job.tokens[-1] if job.tokens else -1),
            slot=job.slot,
        )

    def _end(self, job: Job) -> None:
        self.active.remove(job)
        if job.stream is not None:
            self.loop.finish(job.stream)
        else:
            job.sampler.close()

    def _close_samplers(self, jobs: Iterable[Job]) -> None:
        """Jobs that never started still own their samplers."""
        for job in jobs:
            job.sampler.close()


def _is_late(job: Job, now: float) -> bool:
    return job.deadline is not None and now >= job.deadline
