"""The route of OpenAI's Responses interface."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from specplug.server.answer_response import complete_response, streamed_response
from specplug.server.answering import Answering
from specplug.server.chat_request import ChatRequests
from specplug.server.error_responses import STATUS_DESCRIPTIONS
from specplug.server.event_stream import NAMED_EVENTS
from specplug.server.responses_api.answer import ResponseConversion
from specplug.server.responses_api.request import ResponseRequest, translated
from specplug.server.state import State


def add_response_routes(app: FastAPI, state: State, chats: ChatRequests) -> None:
    errors: Any = {status: {"description": text, "model": None} for status, text in STATUS_DESCRIPTIONS.items()}

    def count(text: str) -> int:
        return len(state.engine.tokenize(text, add_special=False, parse_special=False))

    @app.post("/v1/responses", responses=errors)
    async def responses(request: Request, body: ResponseRequest) -> Response:
        chat, ignored = await asyncio.to_thread(translated, body)
        work, form = await asyncio.to_thread(chats.read, chat)
        conversion = ResponseConversion(state.settings.name, body, count)
        answering = await Answering.start(state, chat, work, form, ignored)
        if not chat.stream:
            return await complete_response(request, answering, conversion.body_of)
        events = conversion.events(answering.chunks(usage=True))
        return streamed_response(answering, events, replace(NAMED_EVENTS, error=conversion.failed))
