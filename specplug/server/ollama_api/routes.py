"""The routes of Ollama's interface."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from specplug.generation.model_description import ModelDescription
from specplug.server.answer_response import complete_response, streamed_response
from specplug.server.answering import Answering
from specplug.server.chat_request import ChatRequests
from specplug.server.completion_request import read_completion
from specplug.server.error_responses import STATUS_DESCRIPTIONS
from specplug.server.event_stream import JSON_LINES
from specplug.server.ollama_api.answer import ChatConversion, GenerateConversion, OllamaConversion, head
from specplug.server.ollama_api.errors import ollama_error
from specplug.server.ollama_api.request import (
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
    description = engine.description
    model = _listed(name, description)
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
        if not body.prompt and not body.suffix:
            return loaded(conversion)
        if not body.is_text:
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
        family = model["details"]["family"]
        thinks = marks_of(engine.chat_template) is not None
        fills_in = engine.fill_in_tokens is not None
        return {
            "modelfile": f"FROM {name}",
            "parameters": f"num_ctx {engine.max_context}",
            "template": engine.chat_template,
            "details": model["details"],
            "model_info": {
                "general.architecture": family,
                "general.parameter_count": description.num_params,
                f"{family}.context_length": engine.max_context,
                f"{family}.embedding_length": description.width,
            },
            "capabilities": ["completion", "tools", *["thinking"] * thinks, *["insert"] * fills_in],
        }

    @app.get("/api/version")
    async def version() -> Json:
        return {"version": API_VERSION}


def _listed(name: str, description: ModelDescription) -> Json:
    """An entry of a list of models."""
    family = description.architecture or "unknown"
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(description.created, UTC).isoformat().replace("+00:00", "Z"),
        "size": description.num_bytes,
        "digest": hashlib.sha256(f"{name} {description}".encode()).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": family,
            "families": [family],
            "parameter_size": _size(description.num_params),
            "quantization_level": description.weight_format,
        },
    }


def _size(num_params: int) -> str:
    """The number of weights as in a model's name: 135M, 1.5B."""
    return f"{num_params / 1e9:.1f}B" if num_params >= 1e9 else f"{num_params / 1e6:.0f}M"
