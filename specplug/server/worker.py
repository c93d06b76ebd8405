"""The thread that owns the engine: it steps while there is work and hands the deltas to the event loop.

It depends on neither an engine nor HTTP.
The deltas of several fast steps are handed over together, because the event loop needs CPU time on a core that
computes target passes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any, TypeVar

from specplug.errors import SpecplugError
from specplug.server.jobs import Delta, Job
from specplug.server.scheduler import Scheduler

MAX_HOLD_S = 0.02
"""How long the deltas of streams are held back at most, in seconds, to be handed over with those of further steps. The
next step is assumed to take as long as the last one."""

log = logging.getLogger(__name__)


CLOSING = "the server is shutting down; retry later"


class ShuttingDown(SpecplugError):
    """The server shuts down before the answer is complete."""


Mailbox = asyncio.Queue[tuple[Job, Delta]]
Result = TypeVar("Result")


class Worker:
    """Runs a scheduler in a thread of its own. Create it anywhere; call every method from the event loop's thread."""

    def __init__(self, scheduler: Scheduler, record: Callable[[Sequence[tuple[Job, Delta]]], None]) -> None:
        """`record` is called with the deltas of every step, in the engine's thread."""
        self.scheduler = scheduler
        self._record = record
        self._wake = threading.Condition()
        self._stopping = False
        self._mailboxes: dict[Job, Mailbox] = {}
        self._changes: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._thread = threading.Thread(target=self._run, name="specplug-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the thread; it delivers to the event loop that is running now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Drop every running answer and end the thread, after at most one more pass."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        while self._thread.is_alive():
            await asyncio.sleep(0.005)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> Mailbox:
        """Queue jobs and return the mailbox that receives their deltas. Raises QueueFull."""
        mailbox: Mailbox = asyncio.Queue()
        self.scheduler.submit(jobs)
        self._mailboxes.update(dict.fromkeys(jobs, mailbox))
        with self._wake:
            self._wake.notify()
        return mailbox

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Cancel jobs that nobody waits for any longer; those that are running end before the next pass."""
        for job in jobs:
            job.cancelled = True
            self._mailboxes.pop(job, None)

    async def between_steps(self, change: Callable[[], Result]) -> Result:
        """Run `change` in the engine's thread before its next step; return its result, or raise its exception.

        Raises ShuttingDown once the thread ends.
        """
        future: Future[Result] = Future()
        with self._wake:
            if self._stopping or not self.alive:
                raise ShuttingDown(CLOSING)
            self._changes.append((change, future))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def abort_all(self) -> None:
        """Cancel every job and send ShuttingDown to its mailbox."""
        for job, mailbox in self._mailboxes.items():
            job.cancelled = True
            mailbox.put_nowait((job, Delta(error=ShuttingDown(CLOSING))))
        self._mailboxes.clear()

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._loop is not None
        held: list[tuple[Job, Delta]] = []
        delivered_at = 0.0
        while True:
            with self._wake:
                while not (self.scheduler.has_work or self._changes or self._stopping):
                    self._wake.wait()
            stopping = self._stopping  # read first: afterwards no change is added
            self._make_changes()
            if stopping:
                self.scheduler.drop_all()
                return
            if not self.scheduler.has_work:
                continue
            began = monotonic()
            try:
                deltas = self.scheduler.step()
            except Exception as error:  # a bug of ours: the running answers fail, the server goes on
                log.exception("a step failed")
                deltas = self.scheduler.fail_running(SpecplugError(f"{type(error).__name__} in a step"))
            self._record(deltas)
            held += deltas
            now = monotonic()
            next_step_too_late = now + (now - began) > delivered_at + MAX_HOLD_S
            streams_wait = next_step_too_late and any(job.streamed for job, _ in held)
            if held and (streams_wait or not self.scheduler.has_work or any(delta.is_last for _, delta in deltas)):
                self._loop.call_soon_threadsafe(self._deliver, held)
                held, delivered_at = [], now

    def _make_changes(self) -> None:
        while self._changes:
            change, future = self._changes.popleft()
            if not future.set_running_or_notify_cancel():  # nobody waits for it any longer
                continue
            try:
                future.set_result(change())
            except Exception as error:
                future.set_exception(error)

    def _deliver(self, deltas: Sequence[tuple[Job, Delta]]) -> None:
        for job, delta in _merged(deltas):
            mailbox = self._mailboxes.get(job)
            if mailbox is not None:
                mailbox.put_nowait((job, delta))
            if delta.is_last:
                self._mailboxes.pop(job, None)


def _merged(deltas: Sequence[tuple[Job, Delta]]) -> list[tuple[Job, Delta]]:
    """One delta per job; a job that ends with an error has that error as a second delta."""
    merged: dict[Job, Delta] = {}
    errors = []
    for job, delta in deltas:
        if delta.error is not None:
            errors.append((job, delta))
        elif job in merged:
            merged[job] = merged[job].followed_by(delta)
        else:
            merged[job] = delta
    return [*merged.items(), *errors]
