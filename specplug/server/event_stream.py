"""Send responses, streamed as events or complete, for as long as the client stays connected.

This module depends on HTTP connections, but not on jobs.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
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


def _data(event: Json) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


def _named(event: Json) -> str:
    return f"event: {event['type']}\n{_data(event)}"


def _line(event: Json) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Framing:
    """How an interface writes the events of a stream.

    media_type  of the response
    write       the text of an event
    error       the event that tells an error, from its HTTP status and its body in OpenAI's format
    end         what follows the last event, also after an error
    """

    media_type: str
    write: Callable[[Json], str]
    error: Callable[[int, Json], Json] = lambda status, body: body
    end: str = ""


DATA_EVENTS = Framing("text/event-stream", _data, end="data: [DONE]\n\n")
"""Server-sent events without names, as in OpenAI's chats."""

NAMED_EVENTS = Framing("text/event-stream", _named)
"""Server-sent events that are named after their field `type`."""

JSON_LINES = Framing("application/x-ndjson", _line)


class EventStream(Response):
    """Events as they arrive; an error is the last one.

    The stream ends early if the client disconnects or reads nothing for SEND_TIMEOUT_S.
    """

    def __init__(
        self, events: AsyncIterator[Json], close: Callable[[], None], headers: Mapping[str, str], framing: Framing
    ) -> None:
        """`close` is called when the stream has ended, for whatever reason."""
        super().__init__(media_type=framing.media_type, headers={"cache-control": "no-store", **headers})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._framing = framing

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
        write, error_event = self._framing.write, self._framing.error

        async def put(text: str, more: bool) -> None:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await put(write(event), True)
        except TimeoutError:
            log.warning("a client read nothing for %g s; its stream was ended", SEND_TIMEOUT_S)
            return
        except SpecplugError as error:  # the status 200 is already sent, so the error is sent as an event
            status, body, _ = error_response(error)
            await put(write(error_event(status, body)), True)
        except Exception as error:
            log.exception("a stream failed")
            body = error_body(f"internal error: {type(error).__name__}", "server_error")
            await put(write(error_event(500, body)), True)
        await put(self._framing.end, False)


async def with_pings(events: AsyncIterator[Json], ping: Json, every_s: float) -> AsyncIterator[Json]:
    """The events, and `ping` whenever none has come for `every_s` seconds."""
    following = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=every_s)
            event = following.result() if done else ping
            if event is None:
                return
            yield event
            if done:
                following = asyncio.ensure_future(anext(events, None))
    finally:
        await _cancel(following)


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


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
