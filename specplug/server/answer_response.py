"""HTTP responses with an answer, streamed or complete.

This module depends on no interface: how bodies and events look is passed to it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from specplug.server.answering import Answering
from specplug.server.event_stream import EventStream, Framing, unless_disconnected
from specplug.server.openai_format import Json, warning_headers


def streamed_response(answering: Answering, events: AsyncIterator[Json], framing: Framing) -> Response:
    """The stream closes `answering` when it ends."""
    return EventStream(events, answering.close, warning_headers(answering.warnings), framing)


async def complete_response(
    request: Request, answering: Answering, convert: Callable[[Json], Json] = lambda body: body
) -> Response:
    """Closes `answering`. Raises the error of a failed job, or HTTPException if the client disconnects.

    convert  the body to send, from the one in OpenAI's format
    """
    try:
        body = convert(await unless_disconnected(request, answering.complete()))
        return JSONResponse(body, headers=warning_headers(answering.warnings))
    finally:
        answering.close()
