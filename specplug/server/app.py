"""The routes: OpenAI's, and specplug's own for tokenizing and metrics.

The application depends on an engine only through `engine_protocol.Engine`. No request can name a file to open.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from specplug import __version__
from specplug.core import IntArray, int_array
from specplug.errors import UsageError
from specplug.server.answer_recorder import AnswerRecorder, AnswerStore
from specplug.server.corpus_routes import add_corpus_routes
from specplug.server.engine_protocol import Engine
from specplug.server.error_responses import STATUS_DESCRIPTIONS, add_error_handlers
from specplug.server.jobs import Delta, Job
from specplug.server.methods import ImpliedMethods
from specplug.server.metrics import Metrics
from specplug.server.openai_format import ChatFormat, CompletionFormat, Json
from specplug.server.page import add_page_routes
from specplug.server.request_handler import handle
from specplug.server.request_schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from specplug.server.sampling_options import chat_sampling, completion_sampling
from specplug.server.scheduler import Scheduler
from specplug.server.state import Settings, State
from specplug.server.tool_calling import ToolCalling
from specplug.server.tools import messages_with_tools
from specplug.server.worker import Worker


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
    metrics = Metrics(engine, scheduler)
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
    app.add_middleware(_RequestCounter, metrics=metrics)
    app.add_middleware(ImpliedMethods, routes=app.routes)
    add_error_handlers(app)
    _add_openai_routes(app, state)
    _add_own_routes(app, state)
    add_corpus_routes(app, state)
    add_page_routes(app)
    return app


def _add_openai_routes(app: FastAPI, state: State) -> None:
    engine, name = state.engine, state.settings.name
    calling = ToolCalling(engine.chat_template, engine.control_token, engine.free_control_tokens)
    errors: Any = {status: {"description": text, "model": None} for status, text in STATUS_DESCRIPTIONS.items()}

    @app.post("/v1/chat/completions", responses=errors)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        plan = await asyncio.to_thread(calling.plan, body)
        messages = messages_with_tools(body, calling.carried)
        listed = body.tools or () if calling.carried and body.tool_choice != "none" else ()
        definitions = [tool.model_dump(exclude_none=True) for tool in listed]
        make_prompt = partial(engine.chat_prompt, messages, definitions)
        response_format = ChatFormat(name, engine.piece, engine.end_tokens, engine.knows_plain_ms, plan.new_reader)
        response_format.warnings += plan.warnings
        max_tokens = body.max_completion_tokens or body.max_tokens
        sampling = chat_sampling(body, plan.lark)
        stops = (*body.stops, *engine.chat_stops)
        return await handle(
            state,
            request,
            body,
            lambda: [make_prompt()],
            response_format,
            sampling,
            max_tokens,
            stops,
            shown=plan.shown,
        )

    @app.post("/v1/completions", responses=errors)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        response_format = CompletionFormat(name, engine.piece, engine.end_tokens, engine.knows_plain_ms)
        sampling = completion_sampling(body)
        max_tokens = body.max_tokens or 16  # OpenAI's default

        def make_prompts() -> list[IntArray]:
            return [_prompt(engine, prompt, parse_special=body.special) for prompt in body.prompts]

        return await handle(
            state, request, body, make_prompts, response_format, sampling, max_tokens, body.stops, bool(body.echo)
        )

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [_model(name, engine)]}

    @app.get("/v1/models/{model:path}", responses={404: {"description": STATUS_DESCRIPTIONS[404]}})
    async def model(model: str) -> Json:
        if model != name:
            raise HTTPException(404, f"the model {model[:100]!r} does not exist; this server has {name!r}")
        return _model(name, engine)


def _add_own_routes(app: FastAPI, state: State) -> None:
    engine = state.engine
    errors: Any = {400: {"description": STATUS_DESCRIPTIONS[400]}}

    @app.get("/health", responses={503: {"description": "The server is shutting down, or its engine has stopped."}})
    async def health() -> Response:
        available = state.worker.alive and not state.closing
        return JSONResponse({"status": "ok" if available else "unavailable"}, 200 if available else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(state.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

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
        _check_ids(body.tokens, engine.num_tokens)
        return {"content": engine.text(body.tokens)}


def _model(name: str, engine: Engine) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "specplug", "max_model_len": engine.max_context}


def _prompt(engine: Engine, prompt: str | list[int], *, parse_special: bool) -> IntArray:
    if isinstance(prompt, str):
        return engine.raw_prompt(prompt, parse_special=parse_special)
    _check_ids(prompt, engine.num_tokens)
    return int_array(prompt)


def _check_ids(tokens: Sequence[int], num_tokens: int) -> None:
    if len(tokens) and int(np.max(tokens)) >= num_tokens:
        raise UsageError(f"there is no token {int(np.max(tokens))}; the vocabulary has {num_tokens} tokens")


class _RequestCounter:
    """Middleware that counts requests by route and status."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_and_count(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # the label is the route's pattern, so that clients cannot add labels
                path = route.path if route is not None else "other"
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, send_and_count if scope["type"] == "http" else send)
