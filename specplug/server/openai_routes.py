"""The routes of OpenAI's API: chats, text completions and models."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from specplug.server.answer_response import complete_response, streamed_response
from specplug.server.answering import Answering
from specplug.server.chat_request import ChatRequests
from specplug.server.completion_request import read_completion
from specplug.server.engine_protocol import Engine
from specplug.server.error_responses import STATUS_DESCRIPTIONS
from specplug.server.event_stream import DATA_EVENTS
from specplug.server.openai_format import Json
from specplug.server.request_schema import ChatRequest, CommonRequest, CompletionRequest
from specplug.server.state import State


def add_openai_routes(app: FastAPI, state: State, chats: ChatRequests) -> None:
    engine, name = state.engine, state.settings.name
    errors: Any = {status: {"description": text, "model": None} for status, text in STATUS_DESCRIPTIONS.items()}

    @app.post("/v1/chat/completions", responses=errors)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        work, form = await asyncio.to_thread(chats.read, body)
        return await _respond(request, body, await Answering.start(state, body, work, form))

    @app.post("/v1/completions", responses=errors)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        work, form = await asyncio.to_thread(read_completion, engine, name, body)
        return await _respond(request, body, await Answering.start(state, body, work, form))

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [_model(name, engine)]}

    @app.get("/v1/models/{model:path}", responses={404: {"description": STATUS_DESCRIPTIONS[404]}})
    async def model(model: str) -> Json:
        if model != name:
            raise HTTPException(404, f"the model {model[:100]!r} does not exist; this server has {name!r}")
        return _model(name, engine)


async def _respond(request: Request, body: CommonRequest, answering: Answering) -> Response:
    if not body.stream:
        return await complete_response(request, answering)
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return streamed_response(answering, answering.chunks(usage=usage), DATA_EVENTS)


def _model(name: str, engine: Engine) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "specplug", "max_model_len": engine.max_context}
