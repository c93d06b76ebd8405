"""Texts that wait for their vectors, and the passes that make them: several texts per pass, whoever sent them.

Depends on the event loop, but not on HTTP. Texts are taken in the order in which they came.
State: the queue, of at most `limit` texts.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.errors import SpecplugError
from specplug.server.embeddings_api.embedder import Embedder
from specplug.server.scheduler import EngineFailed, QueueFull
from specplug.server.worker import CLOSING, ShuttingDown

log = logging.getLogger(__name__)

Vector = npt.NDArray[np.float32]


class EmbeddingQueue:
    """Use it in one event loop. `start` it before the first text."""

    def __init__(self, embedder: Embedder, limit: int) -> None:
        self._embedder = embedder
        self._limit = limit
        self._waiting: deque[tuple[IntArray, asyncio.Future[Vector]]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "specplug-embeddings")
        self._task: asyncio.Task[None] | None = None
        self.passes = 0
        self.texts = 0
        self.tokens = 0
        """Of the texts that have their vectors."""

    @property
    def waiting(self) -> int:
        """Texts that wait."""
        return len(self._waiting)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        self.abort_all()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    def abort_all(self) -> None:
        """Let every text that waits fail."""
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_exception(ShuttingDown(CLOSING))

    async def vectors(self, texts: Sequence[IntArray]) -> list[Vector]:
        """float32[width] per text. Raises QueueFull, EngineFailed or ShuttingDown.

        texts  int32[n] each, 1 <= n <= the embedder's `max_tokens`
        """
        if self._waiting and len(self._waiting) + len(texts) > self._limit:
            raise QueueFull(len(self._waiting), 1)
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Vector]] = [loop.create_future() for _ in texts]
        self._waiting.extend(zip(texts, futures, strict=True))
        self._arrived.set()
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:  # those of a client that has disconnected need no pass
                future.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._next_batch():
                texts = [text for text, _ in batch]
                result: Any
                try:
                    result = await loop.run_in_executor(self._thread, self._embedder.embed, texts)
                except SpecplugError as error:
                    result = EngineFailed(str(error))
                except Exception as error:  # a bug of ours: these texts fail, the server goes on
                    log.exception("a pass failed")
                    result = EngineFailed(f"{type(error).__name__} in a pass")
                self.passes += 1
                self._hand_over(batch, result)

    def _next_batch(self) -> list[tuple[IntArray, asyncio.Future[Vector]]]:
        """The next texts that fit into a pass together, without those whose client has disconnected."""
        batch: list[tuple[IntArray, asyncio.Future[Vector]]] = []
        tokens = 0
        while self._waiting and len(batch) < self._embedder.batch_texts:
            text, future = self._waiting[0]
            if not future.done():
                if tokens + len(text) > self._embedder.batch_tokens:
                    break
                tokens += len(text)
                batch.append((text, future))
            self._waiting.popleft()
        return batch

    def _hand_over(self, batch: Sequence[tuple[IntArray, asyncio.Future[Vector]]], result: Any) -> None:
        for index, (text, future) in enumerate(batch):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result[index])
                self.texts += 1
                self.tokens += len(text)
