"""The routes of OpenAI's API: chats, text completions and models."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from specplug.core import IntArray
from specplug.server.answer_response import complete_response, streamed_response
from specplug.server.answering import Answering, Work
from specplug.server.chat_request import ChatRequests
from specplug.server.engine_protocol import Engine
from specplug.server.error_responses import STATUS_DESCRIPTIONS
from specplug.server.event_stream import DATA_EVENTS
from specplug.server.filling_in import completion_to_fill
from specplug.server.model_listing import listed_model
from specplug.server.openai_format import CompletionFormat, Json
from specplug.server.request_schema import ChatRequest, CommonRequest, CompletionRequest
from specplug.server.sampling_options import completion_sampling
from specplug.server.state import State
from specplug.server.token_ids import checked_ids


def add_openai_routes(app: FastAPI, state: State, chats: ChatRequests) -> None:
    engine, name = state.engine, state.settings.name
    listed = listed_model(name, engine.description, engine.max_context)
    errors: Any = {status: {"description": text, "model": None} for status, text in STATUS_DESCRIPTIONS.items()}

    @app.post("/chat/completions", include_in_schema=False)
    @app.post("/v1/chat/completions", responses=errors)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        work, form = await asyncio.to_thread(chats.read, body)
        return await _respond(request, body, await Answering.start(state, body, work, form))

    @app.post("/completions", include_in_schema=False)
    @app.post("/v1/completions", responses=errors)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        scored = body.logprobs is not None
        form = CompletionFormat(name, engine.piece, engine.end_tokens, engine.knows_plain_ms, scored)
        prompts = await asyncio.to_thread(_prompts, state, body)
        work = Work(prompts, completion_sampling(body), body.limit, body.stops, bool(body.echo))
        return await _respond(request, body, await Answering.start(state, body, work, form))

    @app.get("/models", include_in_schema=False)
    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [listed]}

    @app.get("/v1/models/{model:path}", responses={404: {"description": STATUS_DESCRIPTIONS[404]}})
    async def model(model: str) -> Json:
        if model != name:
            raise HTTPException(404, f"the model {model[:100]!r} does not exist; this server has {name!r}")
        return listed


async def _respond(request: Request, body: CommonRequest, answering: Answering) -> Response:
    if not body.stream:
        return await complete_response(request, answering)
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return streamed_response(answering, answering.chunks(usage=usage), DATA_EVENTS)


def _prompts(state: State, body: CompletionRequest) -> list[IntArray]:
    if body.suffix is not None:
        return [completion_to_fill(state, prompt, body.suffix) for prompt in body.prompts]
    return [_prompt(state.engine, prompt, parse_special=body.special) for prompt in body.prompts]


def _prompt(engine: Engine, prompt: str | list[int], *, parse_special: bool) -> IntArray:
    if isinstance(prompt, str):
        return engine.raw_prompt(prompt, parse_special=parse_special)
    return checked_ids(prompt, engine.num_tokens)
