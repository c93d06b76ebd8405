"""The routes: those of each interface, and specplug's own for tokenizing and metrics.

The application depends on an engine only through `engine_protocol.Engine`. No request can name a file to open.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest

from specplug import __version__
from specplug.errors import UsageError
from specplug.server.answer_recorder import AnswerRecorder, AnswerStore
from specplug.server.chat_request import ChatRequests
from specplug.server.corpus_routes import add_corpus_routes
from specplug.server.engine_protocol import Engine
from specplug.server.error_responses import STATUS_DESCRIPTIONS, add_error_handlers
from specplug.server.jobs import Delta, Job
from specplug.server.llama_server_api.routes import add_llama_server_routes
from specplug.server.messages_api.routes import add_message_routes
from specplug.server.methods import ImpliedMethods
from specplug.server.metrics import Metrics
from specplug.server.ollama_api.routes import add_ollama_routes
from specplug.server.openai_format import Json
from specplug.server.openai_routes import add_openai_routes
from specplug.server.page import add_page_routes
from specplug.server.request_schema import DetokenizeRequest, TokenizeRequest
from specplug.server.responses_api.routes import add_response_routes
from specplug.server.scheduler import Scheduler
from specplug.server.state import Settings, State
from specplug.server.token_ids import checked_ids
from specplug.server.worker import Worker

EMBEDDING_PATHS = ("/v1/embeddings", "/v1/embedding", "/embeddings", "/embedding")
"""Paths of the server of embedding models."""


def make_app(
    engine: Engine, settings: Settings, *, has_key: bool = False, answer_store: AnswerStore | None = None
) -> FastAPI:
    """The application for a loaded engine. Its lifespan starts and stops the worker thread.

    has_key       True if the layers around it let nobody pass without the server's API key
    answer_store  remembers the answers
    """
    scheduler = Scheduler(
        engine.loop,
        slots=engine.slots,
        kv_tokens=engine.kv_tokens,
        queue_limit=settings.queue_limit,
        piece=engine.piece,
        end_tokens=engine.end_tokens,
    )
    metrics = Metrics(engine, scheduler, settings.name)
    answers = AnswerRecorder(answer_store, engine) if answer_store is not None else None

    def record(deltas: Sequence[tuple[Job, Delta]]) -> None:
        metrics.record(deltas)
        if answers is not None:
            answers.record(deltas)

    worker = Worker(scheduler, record)
    state = State(engine, settings, worker, metrics, has_key)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.worker.start()
        writing = asyncio.create_task(answers.run(worker)) if answers is not None else None
        try:
            yield
        finally:
            state.closing = True
            if writing is not None:
                writing.cancel()
            await state.worker.stop()

    app = FastAPI(title="specplug", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.specplug = state
    app.add_middleware(ImpliedMethods, routes=app.routes)
    app.add_middleware(_RequestCounter, metrics=metrics)
    add_error_handlers(app)
    chats = ChatRequests(engine, settings.name)
    add_openai_routes(app, state, chats)
    add_response_routes(app, state, chats)
    add_message_routes(app, state, chats)
    add_ollama_routes(app, state, chats)
    add_llama_server_routes(app, state)
    _add_own_routes(app, state)
    for path in EMBEDDING_PATHS:
        app.add_api_route(path, _refuse_to_embed(settings.name), methods=["POST"], include_in_schema=False)
    add_corpus_routes(app, state)
    add_page_routes(app)
    return app


def _add_own_routes(app: FastAPI, state: State) -> None:
    engine = state.engine
    errors: Any = {400: {"description": STATUS_DESCRIPTIONS[400]}}

    @app.get("/v1/health", include_in_schema=False)
    @app.get("/health", responses={503: {"description": "The server is shutting down, or its engine has stopped."}})
    async def health() -> Response:
        available = state.worker.alive and not state.closing
        return JSONResponse({"status": "ok" if available else "unavailable"}, 200 if available else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(state.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> Json:
        return {"version": __version__}

    @app.get("/specplug/stats")
    async def stats() -> Json:
        profile = engine.profile
        server = {"model": state.settings.name, "profile": profile.name, "speculates": profile.speculates}
        return {**server, **state.metrics.snapshot()}

    @app.post("/tokenize", responses=errors)
    async def tokenize(body: TokenizeRequest) -> Json:
        tokens = await asyncio.to_thread(
            engine.tokenize, body.content, add_special=body.add_special, parse_special=body.parse_special
        )
        return {"tokens": tokens.tolist(), "count": len(tokens)}

    @app.post("/detokenize", responses=errors)
    async def detokenize(body: DetokenizeRequest) -> Json:
        return {"content": engine.text(checked_ids(body.tokens, engine.num_tokens).tolist())}


def _refuse_to_embed(name: str) -> Callable[[], Awaitable[Response]]:
    async def refuse() -> Response:
        raise UsageError(
            f"{name} generates text, and this server has no embeddings; serve an embedding model, or this one with "
            "--embeddings"
        )

    return refuse


class _RequestCounter:
    """Middleware that counts requests by route and status."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        counted = scope["type"] != "http"

        def count(status: int) -> None:
            nonlocal counted
            counted = True
            route = scope.get("route")  # the label is the route's pattern, so that clients cannot add labels
            self._metrics.requests.labels(route.path if route is not None else "other", str(status)).inc()

        async def send_and_count(message: Any) -> None:
            if message["type"] == "http.response.start" and not counted:
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_and_count)
        except Exception:  # answered outside of all middleware
            if not counted:
                count(500)
            raise
