"""The routes of Anthropic's interface."""

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
from specplug.server.event_stream import NAMED_EVENTS, with_pings
from specplug.server.messages_api.answer import PING, MessageConversion
from specplug.server.messages_api.errors import message_error
from specplug.server.messages_api.request import MessageRequest, translated
from specplug.server.openai_format import Json
from specplug.server.state import State

PING_S = 10.0
"""Seconds without an event after which a stream sends a ping, since clients give up on streams that stay silent."""

FRAMING = replace(NAMED_EVENTS, error=message_error)


def add_message_routes(app: FastAPI, state: State, chats: ChatRequests) -> None:
    errors: Any = {status: {"description": text, "model": None} for status, text in STATUS_DESCRIPTIONS.items()}

    @app.post("/v1/messages", responses=errors)
    async def messages(request: Request, body: MessageRequest) -> Response:
        chat, ignored = await asyncio.to_thread(translated, body)
        work, form = await asyncio.to_thread(chats.read, chat)
        answering = await Answering.start(state, chat, work, form, ignored)
        conversion = MessageConversion(state.settings.name, len(work.prompts[0]), chat.stops)
        if not chat.stream:
            return await complete_response(request, answering, conversion.body_of)
        events = conversion.events(answering.chunks(usage=True))
        return streamed_response(answering, with_pings(events, PING, PING_S), FRAMING)

    @app.post("/v1/messages/count_tokens", responses={400: {"description": STATUS_DESCRIPTIONS[400]}})
    async def count_tokens(body: MessageRequest) -> Json:
        chat, _ = await asyncio.to_thread(translated, body)
        work, _ = await asyncio.to_thread(chats.read, chat)
        return {"input_tokens": len(work.prompts[0])}
