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
from specplug.errors import SpecplugError
from specplug.server.corpus_routes import put_corpus
from specplug.server.engine_protocol import Engine
from specplug.server.jobs import Delta, Job
from specplug.server.worker import ShuttingDown, Worker

INTERVAL_S = 5.0
"""Seconds between two writes. An answer can be drafted from that much later."""

log = logging.getLogger(__name__)


class Memory(Protocol):
    """Where answers go; `specplug.engines.remembering.Remembered` implements it. `take` and `write` may run at once."""

    @property
    def name(self) -> str:
        """The name of the corpus."""

    def take(self, prompt: IntArray, answer: Sequence[int], learned: Mapping[str, Sequence[float]]) -> None:
        """Remember an answer when `write` is called."""

    def write(self) -> bool:
        """Write what was taken; whether there was something, and that succeeded. It reports problems itself."""


class AnswerRecorder:
    """Takes answers for a memory, and writes them."""

    def __init__(self, memory: Memory, engine: Engine) -> None:
        self._memory = memory
        self._engine = engine

    def record(self, deltas: Sequence[tuple[Job, Delta]]) -> None:
        """Take the answers that ended with these deltas. Called in the engine's thread."""
        for job, delta in deltas:
            if delta.report is not None and self._may_keep(job):
                self._memory.take(job.prompt, job.tokens, self._engine.learned())

    def _may_keep(self, job: Job) -> bool:
        """Not a private one; where several tenants share the server, only one whose request names the memory."""
        asked, datastore = job.options.corpora, self._engine.datastore
        shared = datastore is not None and datastore.corpora_for == "asking"
        return not job.options.private and (not shared or self._memory.name in (asked or ()))

    async def run(self, worker: Worker) -> None:
        """Write regularly, until it is cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self._write(worker)

    async def _write(self, worker: Worker) -> None:
        """Write what was taken, and draft from it."""
        if not await asyncio.to_thread(self._memory.write):
            return
        datastore = self._engine.datastore
        if datastore is None:
            return
        try:
            corpus = await asyncio.to_thread(self._engine.open_corpus, self._memory.name)
            await worker.between_steps(lambda: put_corpus(datastore, corpus))
        except ShuttingDown:
            pass
        except SpecplugError as error:
            log.warning("remembered answers cannot be opened: %s", error)
