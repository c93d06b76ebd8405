"""The thread that owns the engine: it steps while there is work, and hands what came to the event loop.

Knows threads. Knows neither an engine nor HTTP.
What several fast steps bring is handed over together: the event loop wants a core that a pass is computed on.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic

from specplug.errors import SpecplugError
from specplug.server.jobs import Delta, Job
from specplug.server.scheduler import Scheduler

HELD_S = 0.02
"""How long a piece of a stream is held for those of further steps to go with it, if these take as long as the last."""

log = logging.getLogger(__name__)


class Closing(SpecplugError):
    """The server ends before the answer does."""


Mailbox = asyncio.Queue[tuple[Job, Delta]]


class Worker:
    """Start it in the event loop that waits for the answers."""

    def __init__(self, scheduler: Scheduler, seen: Callable[[Sequence[tuple[Job, Delta]]], None]) -> None:
        """`seen` is told of everything that comes, in the engine's thread."""
        self.scheduler = scheduler
        self._seen = seen
        self._wake = threading.Condition()
        self._stopping = False
        self._mailboxes: dict[Job, Mailbox] = {}
        self._thread = threading.Thread(target=self._run, name="specplug-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Drop every answer under way and end the thread, within one pass."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        while self._thread.is_alive():
            await asyncio.sleep(0.005)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> Mailbox:
        """Where the answers to jobs will come. Raises QueueFull."""
        mailbox: Mailbox = asyncio.Queue()
        self.scheduler.submit(jobs)
        self._mailboxes.update(dict.fromkeys(jobs, mailbox))
        with self._wake:
            self._wake.notify()
        return mailbox

    def forget(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any longer: those that are under way end before the next pass."""
        for job in jobs:
            job.cancelled = True
            self._mailboxes.pop(job, None)

    def give_up(self) -> None:
        """Everyone who still waits is told that the server ends."""
        for job, mailbox in self._mailboxes.items():
            job.cancelled = True
            mailbox.put_nowait((job, Delta(error=Closing("the server is going down; ask another one"))))
        self._mailboxes.clear()

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._loop is not None
        held: list[tuple[Job, Delta]] = []
        handed_over = 0.0
        while True:
            with self._wake:
                while not self.scheduler.work and not self._stopping:
                    self._wake.wait()
            if self._stopping:
                self.scheduler.drop_all()
                return
            began = monotonic()
            try:
                deltas = self.scheduler.step()
            except Exception as error:  # a bug of ours: those under way are told, the server lives on
                log.exception("a step failed")
                deltas = self.scheduler.fail_all(SpecplugError(f"{type(error).__name__} in a step"))
            self._seen(deltas)
            held += deltas
            now = monotonic()
            late = now + (now - began) > handed_over + HELD_S  # after another step
            due = late and any(job.streamed for job, _ in held)
            if held and (due or not self.scheduler.work or any(map(_is_last, deltas))):
                self._loop.call_soon_threadsafe(self._deliver, held)
                held, handed_over = [], now

    def _deliver(self, deltas: Sequence[tuple[Job, Delta]]) -> None:
        for job, delta in _merged(deltas):
            mailbox = self._mailboxes.get(job)
            if mailbox is not None:
                mailbox.put_nowait((job, delta))
            if delta.finish or delta.error is not None:
                self._mailboxes.pop(job, None)


def _is_last(brought: tuple[Job, Delta]) -> bool:
    return bool(brought[1].finish) or brought[1].error is not None


def _merged(deltas: Sequence[tuple[Job, Delta]]) -> list[tuple[Job, Delta]]:
    """One delta for each job, unless it ends with an error: then what came before is one, and the error another."""
    found: dict[Job, Delta] = {}
    errors = []
    for job, delta in deltas:
        if delta.error is not None:
            errors.append((job, delta))
        elif job in found:
            found[job] = found[job].followed_by(delta)
        else:
            found[job] = delta
    return [*found.items(), *errors]
