"""The routes of OpenAI's API: chats, text completions and models."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from specplug.server.answer_response import complete_response, streamed_response
from specplug.server.answering import Answering
from specplug.server.chat_request import ChatRequests
from specplug.server.completion_request import read_completion
from specplug.server.error_responses import STATUS_DESCRIPTIONS
from specplug.server.event_stream import DATA_EVENTS
from specplug.server.model_listing import add_model_routes, listed_model
from specplug.server.request_schema import ChatRequest, CommonRequest, CompletionRequest
from specplug.server.state import State


def add_openai_routes(app: FastAPI, state: State, chats: ChatRequests) -> None:
    engine, name = state.engine, state.settings.name
    errors: Any = {status: {"description": text, "model": None} for status, text in STATUS_DESCRIPTIONS.items()}

    @app.post("/chat/completions", include_in_schema=False)
    @app.post("/v1/chat/completions", responses=errors)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        work, form = await asyncio.to_thread(chats.read, body)
        return await _respond(request, body, await Answering.start(state, body, work, form))

    @app.post("/completions", include_in_schema=False)
    @app.post("/v1/completions", responses=errors)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        work, form = await asyncio.to_thread(read_completion, state, body)
        return await _respond(request, body, await Answering.start(state, body, work, form))

    add_model_routes(app, listed_model(name, engine.description, engine.max_context))


async def _respond(request: Request, body: CommonRequest, answering: Answering) -> Response:
    if not body.stream:
        return await complete_response(request, answering)
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return streamed_response(answering, answering.chunks(usage=usage), DATA_EVENTS)
