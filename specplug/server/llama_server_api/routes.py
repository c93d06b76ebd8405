"""The routes of llama-server's own interface."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from specplug.core import IntArray
from specplug.server.answer_response import complete_response, streamed_response
from specplug.server.answering import Answering, Work
from specplug.server.error_responses import STATUS_DESCRIPTIONS
from specplug.server.event_stream import DATA_EVENTS
from specplug.server.filling_in import infill_prompt
from specplug.server.llama_server_api.answer import LlamaServerFormat
from specplug.server.llama_server_api.mixed_prompt import mixed_prompt
from specplug.server.llama_server_api.request import (
    InfillRequest,
    LlamaCompletionRequest,
    LlamaServerRequest,
    Prompt,
)
from specplug.server.llama_server_api.server_properties import properties, slot_states
from specplug.server.openai_format import Json
from specplug.server.sampling_options import llama_server_sampling
from specplug.server.state import State

UNENDED = replace(DATA_EVENTS, end="")
"""Clients of /completion know the last event by its field `stop`."""


def add_llama_server_routes(app: FastAPI, state: State) -> None:
    errors: Any = {status: {"description": text, "model": None} for status, text in STATUS_DESCRIPTIONS.items()}

    @app.post("/completion", responses=errors)
    async def completion(request: Request, body: LlamaCompletionRequest) -> Response:
        prompts = await asyncio.to_thread(_prompts, state, body.prompts)
        return await _respond(request, state, body, prompts)

    @app.post("/infill", responses=errors)
    async def infill(request: Request, body: InfillRequest) -> Response:
        parts = body.input_prefix, body.input_suffix, body.prompt, body.files, body.limit
        prompt = await asyncio.to_thread(infill_prompt, state, *parts)
        return await _respond(request, state, body, [prompt])

    @app.get("/props")
    async def props() -> Json:
        return properties(state, llama_server_sampling(LlamaServerRequest.model_validate({})))

    @app.get("/slots", responses={503: {"description": "All slots are taken."}})
    async def slots(fail_on_no_slot: Annotated[int, Query()] = 0) -> Response:
        found = slot_states(state)
        if fail_on_no_slot and all(slot["is_processing"] for slot in found):
            raise HTTPException(503, "all slots are taken; retry later")
        return JSONResponse(found)


async def _respond(request: Request, state: State, body: LlamaServerRequest, prompts: list[IntArray]) -> Response:
    engine = state.engine
    sampling = llama_server_sampling(body)
    texts = [engine.text(prompt.tolist()) for prompt in prompts]
    form = LlamaServerFormat(
        state.settings.name, engine.piece, engine.end_tokens, engine.knows_plain_ms, body, sampling, texts
    )
    answering = await Answering.start(state, body, Work(prompts, sampling, body.limit, body.stops), form)
    if body.stream:
        return streamed_response(answering, answering.chunks(usage=False), UNENDED)
    return await complete_response(request, answering)


def _prompts(state: State, prompts: list[Prompt]) -> list[IntArray]:
    return [mixed_prompt(state.engine, prompt) for prompt in prompts]
