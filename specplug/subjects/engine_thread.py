"""A thread that owns specplug's llama.cpp engine: it opens it, steps it while there are answers, and closes it.

It answers with the scheduler of the server, so that an answer costs what it costs there, without HTTP. One thread does
all of that: OpenMP keeps a team of threads for every thread that ever computed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from specplug.core import IntArray
from specplug.engines.llama_cpp.serving_engine import ServingEngine
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Sampling, with_stop_tokens
from specplug.profile import Profile
from specplug.server.jobs import Delta, Job
from specplug.server.scheduler import Scheduler

QUEUE_LIMIT = 1024


@dataclass(slots=True)
class EngineAnswer:
    """What a job has generated; `seconds` are the times of its deltas since it was submitted."""

    job: Job
    deltas: list[Delta] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class EngineThread:
    """Created with the engine open; `close` ends it."""

    def __init__(self, profile: Profile, model_path: Path, slots: int, notify: Callable[[str], None]) -> None:
        """Raises UsageError for a profile or model that cannot be used, EngineError where the engine is missing."""
        self._wake = threading.Condition()
        self._closing = False
        self._mailboxes: dict[Job, queue.SimpleQueue[tuple[float, Delta]]] = {}
        self._opened: Future[tuple[ServingEngine, Scheduler]] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(profile, model_path, slots, notify), name="specplug-subject", daemon=True
        )
        self._thread.start()
        self.engine, self._scheduler = self._opened.result()

    def answer(self, prompt: IntArray, max_tokens: int, sampling: Sampling, max_draft: int) -> EngineAnswer:
        """The whole answer to int32[n]; may be called from several threads. Raises the error that ended it."""
        engine = self.engine
        room = engine.max_context - len(prompt)
        if room < 1:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, and the context is {engine.max_context}; use a larger --context"
            )
        stops = engine.chat_stops
        sampling = with_stop_tokens(sampling, stops, engine.control_token)
        job = Job(
            prompt,
            engine.sampler(sampling),
            min(max_tokens, room),
            max_draft,
            stop=stops,
            stop_tokens=sampling.stop_tokens,
        )
        found = EngineAnswer(job)
        mailbox: queue.SimpleQueue[tuple[float, Delta]] = queue.SimpleQueue()
        began = perf_counter()
        with self._wake:
            if self._closing or not self._thread.is_alive():
                job.sampler.close()
                raise SpecplugError("the engine is closed")
            self._mailboxes[job] = mailbox
            self._scheduler.submit([job])
            self._wake.notify()
        while not found.deltas or not found.deltas[-1].is_last:
            arrived, delta = mailbox.get()
            if delta.error is not None:
                raise delta.error
            found.deltas.append(delta)
            found.seconds.append(arrived - began)
        return found

    def close(self) -> None:
        """Drop the running answers, and close the engine."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _run(self, profile: Profile, model_path: Path, slots: int, notify: Callable[[str], None]) -> None:
        with ExitStack() as stack:
            try:
                engine = _open(stack, profile, model_path, slots, notify)
                scheduler = Scheduler(
                    engine.loop,
                    slots=engine.slots,
                    kv_tokens=engine.kv_tokens,
                    queue_limit=QUEUE_LIMIT,
                    piece=engine.piece,
                    end_tokens=engine.end_tokens,
                )
            except BaseException as error:  # whoever waits for the engine raises it
                self._opened.set_exception(error)
                return
            self._opened.set_result((engine, scheduler))
            self._step(scheduler)

    def _step(self, scheduler: Scheduler) -> None:
        try:
            while self._has_work(scheduler):
                deltas = scheduler.step()
                now = perf_counter()
                for job, delta in deltas:
                    self._mailboxes[job].put((now, delta))
                    if delta.is_last:
                        del self._mailboxes[job]
        finally:  # also where a step has a bug: nobody may wait for ever
            with self._wake:
                self._closing = True
            scheduler.drop_all()
            for mailbox in self._mailboxes.values():
                error = SpecplugError("the engine was closed before the answer ended")
                mailbox.put((perf_counter(), Delta(error=error)))
            self._mailboxes.clear()

    def _has_work(self, scheduler: Scheduler) -> bool:
        """Wait for some; False once the engine shall be closed."""
        with self._wake:
            while not (scheduler.has_work or self._closing):
                self._wake.wait()
            return not self._closing


def _open(
    stack: ExitStack, profile: Profile, model_path: Path, slots: int, notify: Callable[[str], None]
) -> ServingEngine:
    """As `specplug serve` opens it, but that nothing is remembered: measurements must not depend on earlier ones."""
    from specplug.engines.llama_cpp import require

    require()
    from specplug.engines.llama_cpp.drafters.head_finding import with_own_heads
    from specplug.engines.llama_cpp.drafters.opening import open_target

    profile = with_own_heads(profile, model_path)
    model = stack.enter_context(open_target(model_path, [profile], profile.runtime, notify))
    return stack.enter_context(ServingEngine(model, profile, slots=slots, notify=notify))
