"""The routes of Ollama's interface."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from specplug.server.answer_response import complete_response, streamed_response
from specplug.server.answering import Answering
from specplug.server.chat_request import ChatRequests
from specplug.server.completion_request import read_completion
from specplug.server.error_responses import STATUS_DESCRIPTIONS
from specplug.server.event_stream import JSON_LINES
from specplug.server.ollama_api.ollama_answer import ChatConversion, GenerateConversion, OllamaConversion, head
from specplug.server.ollama_api.ollama_errors import ollama_error
from specplug.server.ollama_api.ollama_request import (
    ChatBody,
    GenerateBody,
    ShowBody,
    translated_chat,
    translated_prompt,
    translated_text,
)
from specplug.server.openai_format import Json
from specplug.server.reasoning import marks_of
from specplug.server.request_schema import ChatRequest
from specplug.server.state import State

API_VERSION = "0.12.11"
"""The version of Ollama whose interface this is; clients refuse versions that lack what they need."""

NEVER = "9999-12-31T23:59:59Z"
"""When the model is unloaded."""

FRAMING = replace(JSON_LINES, error=ollama_error)


def add_ollama_routes(app: FastAPI, state: State, chats: ChatRequests) -> None:
    name, engine = state.settings.name, state.engine
    model = _model(name)
    errors: Any = {status: {"description": text, "model": None} for status, text in STATUS_DESCRIPTIONS.items()}

    async def respond(request: Request, answering: Answering, stream: bool, conversion: OllamaConversion) -> Response:
        if not stream:
            return await complete_response(request, answering, conversion.body_of)
        return streamed_response(answering, conversion.events(answering.chunks(usage=True)), FRAMING)

    async def respond_to_chat(
        request: Request, chat: ChatRequest, ignored: list[str], conversion: OllamaConversion
    ) -> Response:
        work, form = await asyncio.to_thread(chats.read, chat)
        answering = await Answering.start(state, chat, work, form, ignored)
        return await respond(request, answering, bool(chat.stream), conversion)

    def loaded(conversion: OllamaConversion) -> Response:
        """The answer to a request without a prompt, which asks Ollama to load a model."""
        return JSONResponse({**head(name), **conversion.contents(), "done": True, "done_reason": "load"})

    @app.post("/api/chat", responses=errors)
    async def chat(request: Request, body: ChatBody) -> Response:
        conversion = ChatConversion(name)
        if not body.messages:
            return loaded(conversion)
        return await respond_to_chat(request, *await asyncio.to_thread(translated_chat, body), conversion)

    @app.post("/api/generate", responses=errors)
    async def generate(request: Request, body: GenerateBody) -> Response:
        conversion = GenerateConversion(name)
        if not body.prompt:
            return loaded(conversion)
        if not body.raw:
            return await respond_to_chat(request, *await asyncio.to_thread(translated_prompt, body), conversion)
        text, ignored = await asyncio.to_thread(translated_text, body)
        work, form = await asyncio.to_thread(read_completion, state, text)
        answering = await Answering.start(state, text, work, form, ignored)
        return await respond(request, answering, bool(text.stream), conversion)

    @app.get("/api/tags")
    async def tags() -> Json:
        return {"models": [model]}

    @app.get("/api/ps")
    async def ps() -> Json:
        running = {"expires_at": NEVER, "size_vram": 0, "context_length": engine.max_context}
        return {"models": [{**model, **running}]}

    @app.post("/api/show", responses={400: {"description": STATUS_DESCRIPTIONS[400]}})
    async def show(body: ShowBody) -> Json:
        thinks = marks_of(engine.chat_template) is not None
        return {
            "modelfile": f"FROM {name}",
            "parameters": f"num_ctx {engine.max_context}",
            "template": engine.chat_template,
            "details": DETAILS,
            "model_info": {"general.architecture": FAMILY, f"{FAMILY}.context_length": engine.max_context},
            "capabilities": ["completion", "tools", *(["thinking"] if thinks else [])],
        }

    @app.get("/api/version")
    async def version() -> Json:
        return {"version": API_VERSION}


FAMILY = "specplug"
"""Stands for the model's architecture, which engines do not tell."""

DETAILS: Json = {
    "parent_model": "",
    "format": "gguf",
    "family": FAMILY,
    "families": [FAMILY],
    "parameter_size": "",
    "quantization_level": "",
}


def _model(name: str) -> Json:
    """An entry of a list of models; it stays the same as long as the server runs."""
    began = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    digest = hashlib.sha256(name.encode()).hexdigest()
    return {"name": name, "model": name, "modified_at": began, "size": 0, "digest": digest, "details": DETAILS}
