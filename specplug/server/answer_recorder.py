"""Remembers the server's answers while it runs, and lets drafting see them.

The engine's thread hands over complete answers. A task of the event loop has them written in another thread, and then
exchanges the open corpus between two steps. This module depends on no engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from specplug.core import IntArray
from specplug.server.engine_protocol import Engine
from specplug.server.jobs import Delta, Job
from specplug.server.worker import ShuttingDown, Worker

INTERVAL_S = 5.0
"""Seconds between two writes. An answer can be drafted from that much later."""

log = logging.getLogger(__name__)


class AnswerStore(Protocol):
    """Where answers go; `specplug.engines.remembering.Remembered` implements it.

    `take` and `write` are called in two threads.
    """

    @property
    def name(self) -> str:
        """The name of the corpus."""

    def take(self, prompt: IntArray, answer: Sequence[int], learned: Mapping[str, Sequence[float]]) -> None:
        """Remember an answer when `write` is called."""

    def write(self) -> bool:
        """Write what was taken; whether there was something, and that succeeded. It reports problems itself."""


class AnswerRecorder:
    """Takes the answers that may be kept, and has them written."""

    def __init__(self, store: AnswerStore, engine: Engine) -> None:
        self._store = store
        self._engine = engine
        self._others_ran = False
        """Whether a request ran that may not be kept: the learned acceptance counts its draft tokens, too."""
        if engine.datastore is not None:
            engine.datastore.expected = store.name

    def record(self, deltas: Sequence[tuple[Job, Delta]]) -> None:
        """Take the answers that ended with these deltas. Called in the engine's thread; it raises nothing."""
        try:
            self._others_ran |= not all(self._may_keep(job) for job, _ in deltas)
            for job, delta in deltas:
                if delta.report is not None and self._may_keep(job):
                    self._store.take(job.prompt, job.tokens, {} if self._others_ran else self._engine.learned())
        except Exception:  # answers go on
            log.exception("answers are not remembered")

    def _may_keep(self, job: Job) -> bool:
        """Not a private one; where several tenants share the server, only one whose request names the corpus."""
        asked, datastore = job.options.corpora, self._engine.datastore
        shared = datastore is not None and datastore.corpora_for == "asking"
        return not job.options.private and (not shared or self._store.name in (asked or ()))

    async def run(self, worker: Worker) -> None:
        """Write regularly, until it is cancelled or the engine's thread ends."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self._write(worker)
            except ShuttingDown:
                return
            except Exception as error:
                log.warning("remembered answers cannot be drafted from: %s", error)

    async def _write(self, worker: Worker) -> None:
        """Write what was taken, and draft from it, unless the corpus was closed."""
        datastore, name = self._engine.datastore, self._store.name
        if await asyncio.to_thread(self._store.write) and datastore is not None and datastore.expected == name:
            corpus = await asyncio.to_thread(self._engine.open_corpus, name)
            await worker.between_steps(lambda: datastore.expected == name and datastore.open(corpus))
