"""The routes: OpenAI's, and our own for tokens, figures and the page.

Knows paths. Knows no engine but by `engine.Engine`, and opens no file that a request names.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from specplug import __version__
from specplug.core import IntArray, int_array
from specplug.errors import UsageError
from specplug.server.answering import answer
from specplug.server.engine_protocol import Engine
from specplug.server.figures import Figures
from specplug.server.refusals import STATUSES, add_errors
from specplug.server.request_schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from specplug.server.sampling_options import chat_sampling, completion_sampling
from specplug.server.scheduler import Scheduler
from specplug.server.shapes import ChatShape, CompletionShape, Json
from specplug.server.state import Settings, State
from specplug.server.tools import messages_with_tools
from specplug.server.worker import Worker

STATIC = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}

PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application around an open engine; its worker starts and ends with it."""
    scheduler = Scheduler(
        engine.loop,
        slots=engine.slots,
        kv_tokens=engine.kv_tokens,
        queue_limit=settings.queue_limit,
        piece=engine.piece,
        end_tokens=engine.end_tokens,
    )
    figures = Figures(engine, scheduler)
    state = State(engine, settings, Worker(scheduler, figures.saw), figures)

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
    app.add_middleware(_Counted, figures=figures)
    add_errors(app)
    _add_openai_routes(app, state)
    _add_own_routes(app, state)
    return app


def _add_openai_routes(app: FastAPI, state: State) -> None:
    engine, name = state.engine, state.settings.name
    refusals: Any = {status: {"description": text, "model": None} for status, text in STATUSES.items()}

    @app.post("/v1/chat/completions", responses=refusals)
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        tools = list(asked.tools or ()) if asked.tool_choice != "none" else []
        messages = messages_with_tools(asked, engine.carries_tools)
        described = [tool.model_dump(exclude_none=True) for tool in tools]
        read = partial(engine.chat_prompt, messages, described if engine.carries_tools else ())
        shape = ChatShape(
            name, engine.piece, engine.end_tokens, engine.knows_plain_ms, [tool.function.name for tool in tools]
        )
        most = asked.max_completion_tokens or asked.max_tokens
        return await answer(state, request, asked, lambda: [read()], shape, chat_sampling(asked), most)

    @app.post("/v1/completions", responses=refusals)
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        shape = CompletionShape(name, engine.piece, engine.end_tokens, engine.knows_plain_ms)
        sampling = completion_sampling(asked)

        def read() -> list[IntArray]:
            return [_prompt(engine, prompt) for prompt in asked.prompts]

        return await answer(state, request, asked, read, shape, sampling, asked.max_tokens or 16, echo=bool(asked.echo))

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [_model(name, engine)]}

    @app.get("/v1/models/{model}", responses={404: {"description": STATUSES[404]}})
    async def model(model: str) -> Json:
        if model != name:
            raise HTTPException(404, f"the model {model[:100]!r} does not exist; there is {name!r}")
        return _model(name, engine)


def _add_own_routes(app: FastAPI, state: State) -> None:
    engine = state.engine
    refusals: Any = {400: {"description": STATUSES[400]}}

    @app.get("/health", responses={503: {"description": "Going down, or its engine has ended."}})
    async def health() -> Response:
        well = state.worker.alive and not state.closing
        return JSONResponse({"status": "ok" if well else "unavailable"}, 200 if well else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(state.figures.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/specplug/stats")
    async def stats() -> Json:
        profile = engine.profile
        shown = {"model": state.settings.name, "profile": profile.name, "speculates": profile.speculates}
        return {**shown, **state.figures.now()}

    @app.post("/tokenize", responses=refusals)
    async def tokenize(asked: TokenizeRequest) -> Json:
        tokens = await asyncio.to_thread(engine.tokenize, asked.content, add_special=asked.add_special)
        return {"tokens": tokens.tolist(), "count": len(tokens)}

    @app.post("/detokenize", responses=refusals)
    async def detokenize(asked: DetokenizeRequest) -> Json:
        _check_ids(asked.tokens, engine.num_tokens)
        return {"content": engine.text(asked.tokens)}

    for path, (file, kind) in STATIC.items():
        content = files("specplug.server").joinpath("static", file).read_bytes()
        app.add_api_route(path, _fixed(content, kind), include_in_schema=False)


def _model(name: str, engine: Engine) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "specplug", "max_model_len": engine.max_context}


def _fixed(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def fixed() -> Response:
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    return fixed


def _prompt(engine: Engine, prompt: str | list[int]) -> IntArray:
    if isinstance(prompt, str):
        return engine.tokenize(prompt)
    _check_ids(prompt, engine.num_tokens)
    return int_array(prompt)


def _check_ids(tokens: Sequence[int], num_tokens: int) -> None:
    if len(tokens) and int(np.max(tokens)) >= num_tokens:
        raise UsageError(f"token {int(np.max(tokens))} is none; the vocabulary has {num_tokens} tokens")


class _Counted:
    """Counts answered requests by path and status."""

    def __init__(self, app: Any, figures: Figures) -> None:
        self._app = app
        self._figures = figures

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # its pattern, so that nobody can make labels up
                path = route.path if route is not None else "other"
                self._figures.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
