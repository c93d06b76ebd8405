"""The routes of OpenAI's API: chats, text completions and models."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from specplug.core import IntArray, int_array
from specplug.errors import UsageError
from specplug.server.answering import Answering, Work
from specplug.server.chat_request import ChatRequests
from specplug.server.engine_protocol import Engine
from specplug.server.error_responses import STATUS_DESCRIPTIONS
from specplug.server.event_stream import EventStream, unless_disconnected
from specplug.server.openai_format import CompletionFormat, Json, warning_headers
from specplug.server.request_schema import ChatRequest, CommonRequest, CompletionRequest
from specplug.server.sampling_options import completion_sampling
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
        form = CompletionFormat(name, engine.piece, engine.end_tokens, engine.knows_plain_ms)
        prompts = await asyncio.to_thread(_prompts, engine, body)
        work = Work(prompts, completion_sampling(body), body.limit, body.stops, bool(body.echo))
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
    headers = warning_headers(answering.warnings)
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(answering.chunks(usage=usage), answering.close, headers)
    try:
        return JSONResponse(await unless_disconnected(request, answering.complete()), headers=headers)
    finally:
        answering.close()


def _model(name: str, engine: Engine) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "specplug", "max_model_len": engine.max_context}


def _prompts(engine: Engine, body: CompletionRequest) -> list[IntArray]:
    return [_prompt(engine, prompt, parse_special=body.special) for prompt in body.prompts]


def _prompt(engine: Engine, prompt: str | list[int], *, parse_special: bool) -> IntArray:
    if isinstance(prompt, str):
        return engine.raw_prompt(prompt, parse_special=parse_special)
    check_ids(prompt, engine.num_tokens)
    return int_array(prompt)


def check_ids(tokens: Sequence[int], num_tokens: int) -> None:
    """Raise UsageError for an id outside of the vocabulary."""
    if len(tokens) and int(np.max(tokens)) >= num_tokens:
        raise UsageError(f"there is no token {int(np.max(tokens))}; the vocabulary has {num_tokens} tokens")
