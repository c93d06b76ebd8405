"""The application that serves an embedding model, and refuses by name what needs a model that generates text."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException

from specplug import __version__
from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.server.embeddings_api.embedder import Embedder
from specplug.server.embeddings_api.embedding_queue import EmbeddingQueue, Vector
from specplug.server.embeddings_api.request import EmbeddingRequest
from specplug.server.error_responses import STATUS_DESCRIPTIONS, ContextExceeded, add_error_handlers
from specplug.server.event_stream import unless_disconnected
from specplug.server.methods import ImpliedMethods
from specplug.server.model_listing import add_model_routes, listed_model
from specplug.server.openai_format import Json, warning_headers
from specplug.server.request_fields import ignored
from specplug.server.state import Settings
from specplug.server.token_ids import checked_ids

GENERATING = ("/v1/chat/completions", "/v1/completions", "/chat/completions", "/completions", "/completion", "/infill")
"""Paths of the server of generating models."""


@dataclass(slots=True)
class EmbeddingState:
    """`closing` is set once the server accepts no new requests."""

    embedder: Embedder
    settings: Settings
    worker: EmbeddingQueue
    closing: bool = False


def make_embedding_app(embedder: Embedder, settings: Settings) -> FastAPI:
    """The application for a loaded embedding model. Its lifespan starts and stops the passes."""
    state = EmbeddingState(embedder, settings, EmbeddingQueue(embedder, settings.queue_limit * embedder.batch_texts))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.worker.start()
        try:
            yield
        finally:
            state.closing = True
            await state.worker.stop()

    app = FastAPI(title="specplug", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.specplug = state
    app.add_middleware(ImpliedMethods, routes=app.routes)
    add_error_handlers(app)
    _add_embedding_routes(app, state)
    _add_describing_routes(app, state)
    for path in GENERATING:
        app.add_api_route(path, _refuse_to_generate(settings.name), methods=["POST"], include_in_schema=False)
    return app


def _add_embedding_routes(app: FastAPI, state: EmbeddingState) -> None:
    errors: Any = {status: {"description": text, "model": None} for status, text in STATUS_DESCRIPTIONS.items()}

    @app.post("/embeddings", include_in_schema=False)
    @app.post("/v1/embedding", include_in_schema=False)
    @app.post("/v1/embeddings", responses=errors)
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        texts, vectors, headers = await _embedded(request, state, body)
        tokens = sum(map(len, texts))
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        model = state.settings.name
        return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage}, headers=headers)

    @app.post("/embedding", responses=errors)
    async def llama_server_embedding(request: Request, body: EmbeddingRequest) -> Response:
        """llama-server's shape, in which a text may have several vectors."""
        _, vectors, headers = await _embedded(request, state, body)
        found = [{"index": index, "embedding": [vector.tolist()]} for index, vector in enumerate(vectors)]
        return JSONResponse(found, headers=headers)


def _add_describing_routes(app: FastAPI, state: EmbeddingState) -> None:
    embedder, name, queue = state.embedder, state.settings.name, state.worker
    add_model_routes(app, listed_model(name, embedder.description, embedder.max_tokens))
    registry = CollectorRegistry()
    registry.register(_Figures(queue))

    @app.get("/v1/health", include_in_schema=False)
    @app.get("/health", responses={503: {"description": "The server is shutting down."}})
    async def health() -> Response:
        return JSONResponse({"status": "unavailable" if state.closing else "ok"}, 503 if state.closing else 200)

    @app.get("/version")
    async def version() -> Json:
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _embedded(
    request: Request, state: EmbeddingState, body: EmbeddingRequest
) -> tuple[list[IntArray], Sequence[Vector], dict[str, str]]:
    """The tokens of the texts of a request, their vectors, and headers with warnings."""
    if state.closing:
        raise HTTPException(503, "the server is shutting down; retry later")
    names = sorted(set(ignored(body)))
    if names and state.settings.strict:
        raise UsageError(f"Unrecognized request argument supplied: {names[0][:100]}")
    if body.dimensions not in (None, state.embedder.width):
        raise UsageError(f"dimensions: vectors of this model have {state.embedder.width} numbers; leave it out")
    texts = await asyncio.to_thread(_tokens, state.embedder, body)
    vectors = await unless_disconnected(request, state.worker.vectors(texts))
    warnings = [f"ignored: {', '.join(one[:100] for one in names[:20])}"] if names else []
    return texts, vectors, warning_headers(warnings)


def _tokens(embedder: Embedder, body: EmbeddingRequest) -> list[IntArray]:
    texts = [
        embedder.tokenize(one) if isinstance(one, str) else checked_ids(one, embedder.num_tokens) for one in body.inputs
    ]
    for index, text in enumerate(texts):
        if len(text) > embedder.max_tokens:
            raise ContextExceeded(
                f"input: text {index} has {len(text)} tokens; this server takes {embedder.max_tokens} of one text"
            )
    return texts


def _encoded(vector: Vector, encoding: str) -> list[float] | str:
    """A list of numbers, or the bytes of little-endian float32 in base64."""
    if encoding == "base64":
        return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def _refuse_to_generate(name: str) -> Any:
    async def refuse() -> Response:
        raise UsageError(f"this server makes embeddings with {name} and generates no text; use /v1/embeddings")

    return refuse


class _Figures:
    """prometheus-client calls `collect` at every scrape."""

    def __init__(self, queue: EmbeddingQueue) -> None:
        self._queue = queue

    def collect(self) -> list[Metric]:
        queue = self._queue
        return [
            CounterMetricFamily("specplug_embedded_texts", "Texts whose vectors were made.", value=queue.texts),
            CounterMetricFamily("specplug_embedded_tokens", "Tokens of these texts.", value=queue.tokens),
            CounterMetricFamily("specplug_embedding_passes", "Passes of the model.", value=queue.passes),
            GaugeMetricFamily("specplug_waiting_texts", "Texts that wait.", value=queue.waiting),
        ]
