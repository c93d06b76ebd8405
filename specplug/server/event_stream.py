"""Send responses, streamed as server-sent events or complete, for as long as the client stays connected.

This module depends on HTTP connections, but not on jobs.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from specplug.errors import SpecplugError
from specplug.server.error_responses import error_response
from specplug.server.openai_format import Json, error_body

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 60.0
"""A connection is dropped if the client reads nothing for this many seconds."""


class EventStream(Response):
    """Server-sent events. After an error, which is an event too, as after an answer the last event is [DONE].

    The stream ends early if the client disconnects or reads nothing for SEND_TIMEOUT_S.
    """

    def __init__(self, events: AsyncIterator[Json], close: Callable[[], None], headers: Mapping[str, str]) -> None:
        """`close` is called when the stream has ended, for whatever reason."""
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store", **headers})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.create_task(self._send(send))
        disconnecting = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._close()
            await _cancel(sending, disconnecting)

    async def _send(self, send: Any) -> None:
        async def put(text: str, more: bool) -> None:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await put(_event(event), True)
        except TimeoutError:
            log.warning("a client read nothing for %g s; its stream was ended", SEND_TIMEOUT_S)
            return
        except SpecplugError as error:  # the status 200 is already sent, so the error is sent as an event
            await put(_event(error_response(error)[1]), True)
        except Exception as error:
            log.exception("a stream failed")
            await put(_event(error_body(f"internal error: {type(error).__name__}", "server_error")), True)
        await put("data: [DONE]\n\n", False)


async def unless_disconnected(request: Request, work: Any) -> Any:
    """The result of the coroutine `work`, which is cancelled if the client disconnects first."""
    result = asyncio.ensure_future(work)
    disconnecting = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({result, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise HTTPException(499, "the client has disconnected")
    finally:
        await _cancel(result, disconnecting)


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
