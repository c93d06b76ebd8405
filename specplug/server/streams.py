"""Sending: for as long as the client stays.

Knows server-sent events and connections that end. Knows no jobs.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from specplug.errors import SpecplugError
from specplug.server.refusals import refusal
from specplug.server.shapes import Json

log = logging.getLogger(__name__)

SEND_SECONDS = 60.0
"""A client that takes nothing for so long is given up."""


class EventStream(Response):
    """Server-sent events that end with the client: when it leaves, or takes nothing for SEND_SECONDS."""

    def __init__(self, events: AsyncIterator[Json], close: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._close()
            await _end(sending, leaving)

    async def _send(self, send: Any) -> None:
        async def put(text: str, more: bool) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = "data: [DONE]\n\n"
        try:
            async for event in self._events:
                await put(_event(event), True)
        except TimeoutError:
            log.warning("a client took nothing for %g s and was given up", SEND_SECONDS)
            return
        except SpecplugError as error:  # too late for a status
            _, body, _ = refusal(error)
            last = _event(body)
        await put(last, False)


async def unless_gone(request: Request, making: Any) -> Any:
    """What `making` comes to; cancelled where the client leaves before."""
    answer = asyncio.ensure_future(making)
    leaving = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise HTTPException(499, "the client has left")
    finally:
        await _end(answer, leaving)


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
