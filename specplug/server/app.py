"""The routes: OpenAI's, and our own for tokens, figures and the page.

Knows HTTP, jobs and shapes. Knows no engine but by `engine.Engine`, and opens no file that a request names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from time import monotonic
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from specplug import __version__
from specplug.answers import Sampling
from specplug.core import IntArray, int_array
from specplug.errors import SpecplugError, UsageError
from specplug.server.engine import Engine
from specplug.server.figures import Figures
from specplug.server.jobs import Delta, Job
from specplug.server.requests import (
    ChatRequest,
    Common,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from specplug.server.scheduler import EngineFailed, Late, QueueFull, Scheduler
from specplug.server.shapes import ChatShape, Choice, CompletionShape, Json, Shape, error_body
from specplug.server.tools import forced_schema, messages_with_tools
from specplug.server.worker import Closing, Mailbox, Worker

log = logging.getLogger(__name__)

SEND_SECONDS = 60.0
"""A client that takes nothing for so long is given up."""

NO_LIMIT = 1 << 20
"""Guesses per step where the client names no limit; the planner has its own."""

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


@dataclass(frozen=True, slots=True)
class Settings:
    """name         the model's, as clients see it
    queue_limit  answers that may wait beside those under way
    deadline     seconds for an answer that names none; None is for ever
    log_prompts  whether what is asked and answered goes to the log
    """

    name: str
    queue_limit: int = 64
    deadline: float | None = None
    log_prompts: bool = False


@dataclass(slots=True)
class State:
    """What the routes share. `closing` once no new answer may begin."""

    engine: Engine
    settings: Settings
    worker: Worker
    figures: Figures
    closing: bool = False


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
    _add_errors(app)
    _add_openai_routes(app, state)
    _add_own_routes(app, state)
    return app


# -- OpenAI's routes --------------------------------------------------------------------------------------------------


def _add_openai_routes(app: FastAPI, state: State) -> None:
    engine, name = state.engine, state.settings.name
    refusals: Any = {status: {"description": text, "model": None} for status, text in _STATUSES.items()}

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
        return await _answer(state, request, asked, lambda: [read()], shape, _chat_sampling(asked), most)

    @app.post("/v1/completions", responses=refusals)
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        shape = CompletionShape(name, engine.piece, engine.end_tokens, engine.knows_plain_ms)
        sampling = _sampling(asked, logprobs=asked.logprobs)

        def read() -> list[IntArray]:
            return [_prompt(engine, prompt) for prompt in asked.prompts]

        return await _answer(
            state, request, asked, read, shape, sampling, asked.max_tokens or 16, echo=bool(asked.echo)
        )

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [_model(name, engine)]}

    @app.get("/v1/models/{model}", responses={404: {"description": _STATUSES[404]}})
    async def model(model: str) -> Json:
        if model != name:
            raise HTTPException(404, f"the model {model[:100]!r} does not exist; there is {name!r}")
        return _model(name, engine)


def _add_own_routes(app: FastAPI, state: State) -> None:
    engine = state.engine
    refusals: Any = {400: {"description": _STATUSES[400]}}

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


_STATUSES = {
    400: "The request is wrong; the message says where.",
    404: "No such model.",
    408: "The deadline passed before the answer began.",
    429: "Too many answers wait; Retry-After says when to ask again.",
    503: "The server is going down, or the engine failed at this answer.",
}


def _model(name: str, engine: Engine) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "specplug", "max_model_len": engine.max_context}


def _fixed(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def fixed() -> Response:
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    return fixed


# -- an answer --------------------------------------------------------------------------------------------------------


class Answering:
    """The jobs of one request, and where their deltas come."""

    def __init__(self, state: State, jobs: Sequence[Job]) -> None:
        """Raises QueueFull."""
        self._state = state
        self._places = {job: index for index, job in enumerate(jobs)}
        self._mailbox: Mailbox = state.worker.submit(jobs)
        self.choices = [Choice(index) for index in range(len(jobs))]

    async def deltas(self) -> AsyncIterator[tuple[Choice, Delta]]:
        """Each delta with the choice that has taken it, until all are complete. Raises what ended one of them."""
        left = len(self._places)
        while left:
            job, delta = await self._mailbox.get()
            if delta.error is not None:
                raise delta.error
            choice = self.choices[self._places[job]]
            choice.take(delta)
            left -= bool(delta.finish)
            yield choice, delta

    def close(self) -> None:
        """What is not complete ends here."""
        jobs = list(self._places)
        self._state.worker.forget(jobs)
        self._state.figures.forget(jobs)


async def _answer(
    state: State,
    request: Request,
    asked: Common,
    read: Callable[[], list[IntArray]],
    shape: Shape,
    sampling: Sampling,
    most: int | None,
    echo: bool = False,
) -> Response:
    """Let the answers be made; `read` gives the prompts, `most` limits the tokens of each answer."""
    if state.closing:
        raise HTTPException(503, "the server is going down; ask another one")
    prompts = await asyncio.to_thread(read)
    jobs = await asyncio.to_thread(_jobs, state, asked, prompts, sampling, most)
    if state.settings.log_prompts:
        for prompt in prompts:
            log.info("prompt %r", state.engine.text(prompt.tolist()))
    try:
        answering = Answering(state, jobs)
    except QueueFull:
        for job in jobs:
            job.sampler.close()
        raise
    echoed = [state.engine.text(prompt.tolist()) for prompt in prompts] if echo else []
    if asked.stream:
        return _EventStream(_events(answering, asked, shape, len(prompts), echoed), answering.close)

    async def whole() -> Json:
        async for choice, delta in answering.deltas():
            if delta.finish and state.settings.log_prompts:
                log.info("answer %r", choice.text)
        for choice in answering.choices if echoed else ():
            choice.text = echoed[choice.index // asked.n] + choice.text
        return shape.whole(answering.choices, len(prompts))

    try:
        return JSONResponse(await _unless_gone(request, whole()))
    finally:
        answering.close()


def _jobs(state: State, asked: Common, prompts: Sequence[IntArray], sampling: Sampling, most: int | None) -> list[Job]:
    """n jobs for each prompt; in a thread of its own, since grammars take their time."""
    engine, options = state.engine, asked.specplug
    max_draft = 0 if options.mode == "off" else NO_LIMIT if options.max_draft is None else options.max_draft
    seconds = options.deadline or state.settings.deadline
    deadline = monotonic() + seconds if seconds is not None else None
    jobs: list[Job] = []
    try:
        for prompt in prompts:
            room = engine.max_context - len(prompt)
            if not len(prompt):
                raise UsageError("the prompt is empty; give at least one token")
            if room < 1:
                raise ContextExceeded(
                    f"the prompt has {len(prompt)} tokens, the context {engine.max_context}; shorten it"
                )
            for index in range(asked.n):
                seed = None if sampling.seed is None else (sampling.seed + index) % (2**32 - 1)
                limit = min(most or room, room)
                drawn = replace(sampling, seed=seed, penalty_last_n=limit)
                sampler = engine.sampler(drawn)
                jobs.append(Job(prompt, sampler, limit, max_draft, asked.stops, deadline, bool(asked.stream)))
    except BaseException:
        for job in jobs:
            job.sampler.close()
        raise
    return jobs


async def _events(
    answering: Answering, asked: Common, shape: Shape, prompts: int, echoed: Sequence[str]
) -> AsyncIterator[Json]:
    """The pieces of a streamed answer."""
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    opened: set[int] = set()
    async for choice, delta in answering.deltas():
        if choice.index not in opened:
            opened.add(choice.index)
            for opening in shape.opening(choice.index):
                yield shape.chunk([opening])
            if echoed:
                text = echoed[choice.index // asked.n]
                yield shape.chunk([{"index": choice.index, "text": text, "logprobs": None, "finish_reason": None}])
        further: Json = {"usage": None} if with_usage else {}
        if asked.specplug.details:
            drafted = [[segment.text, segment.drafted] for segment in delta.segments]
            further["specplug"] = {"index": choice.index, "segments": drafted}
        for piece in shape.piece(choice, delta):
            yield shape.chunk([piece], **further)
            further.pop("specplug", None)  # once
    if with_usage or asked.specplug.details:
        usage = shape.usage(answering.choices, prompts) if with_usage else None
        yield shape.chunk([], usage=usage, specplug=shape.figures(answering.choices))


class _EventStream(Response):
    """Server-sent events that end with the client: when it leaves, or takes nothing for SEND_SECONDS."""

    def __init__(self, events: AsyncIterator[Json], close: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._close()
            await _end(sending, leaving)

    async def _send(self, send: Any) -> None:
        async def put(text: str, more: bool) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = "data: [DONE]\n\n"
        try:
            async for event in self._events:
                await put(_event(event), True)
        except TimeoutError:
            log.warning("a client took nothing for %g s and was given up", SEND_SECONDS)
            return
        except SpecplugError as error:  # too late for a status
            _, body, _ = _refusal(error)
            last = _event(body)
        await put(last, False)


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, making: Any) -> Any:
    """What `making` comes to; cancelled where the client leaves before."""
    answer = asyncio.ensure_future(making)
    leaving = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise HTTPException(499, "the client has left")
    finally:
        await _end(answer, leaving)


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# -- what is asked, in our terms --------------------------------------------------------------------------------------


class ContextExceeded(UsageError):
    """A prompt is longer than the context."""


def _sampling(asked: Common, *, logprobs: int | None, json_schema: str | None = None) -> Sampling:
    """OpenAI's defaults; top_k and min_p, which its API does not have, are llama.cpp's."""
    default = Sampling()
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=default.top_k if asked.top_k is None else asked.top_k,
        min_p=default.min_p if asked.min_p is None else asked.min_p,
        seed=None if asked.seed is None else asked.seed % (2**32 - 1),
        repeat_penalty=asked.repeat_penalty or 1.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (asked.logit_bias or {}).items()},
        grammar=asked.grammar,
        json_schema=json_schema,
        logprobs=logprobs,
    )


def _chat_sampling(asked: ChatRequest) -> Sampling:
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    schema: Json | None = forced_schema(asked)
    if asked.response_format is not None and asked.response_format.type != "text":
        wanted = asked.response_format.json_schema
        schema = wanted.schema_ if wanted is not None and wanted.schema_ else {"type": "object"}
    return _sampling(asked, logprobs=logprobs, json_schema=None if schema is None else json.dumps(schema))


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


# -- errors -----------------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(SpecplugError)
    async def of_ours(request: Request, error: SpecplugError) -> Response:
        status, body, headers = _refusal(error)
        return JSONResponse(body, status, headers)

    @app.exception_handler(UnicodeEncodeError)
    async def of_text(request: Request, error: UnicodeEncodeError) -> Response:
        return JSONResponse(error_body("a text is not Unicode: half of a surrogate pair", "invalid_request_error"), 400)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        code = "model_not_found" if request.url.path.startswith("/v1/models/") else None
        return JSONResponse(error_body(str(error.detail), kind, code), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:])) or None
        if first["type"] == "extra_forbidden":
            message = f"Unrecognized request argument supplied: {param}"
        else:
            message = f"{param or 'the body'}: {first['msg']}"
        return JSONResponse(error_body(message[:500], "invalid_request_error", None, param), 400)

    @app.exception_handler(Exception)
    async def of_bugs(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(f"{type(error).__name__} in the server", "server_error"), 500)


def _refusal(error: SpecplugError) -> tuple[int, Json, dict[str, str] | None]:
    """Status, body and headers for an error of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, QueueFull):
        body = error_body(text, "rate_limit_error", "queue_full")
        return 429, body, {"retry-after": str(error.retry_after_s)}
    if isinstance(error, Late):
        return 408, error_body(text, "timeout_error", "deadline_passed"), None
    if isinstance(error, Closing):
        return 503, error_body(text, "server_error", "closing"), None
    if isinstance(error, EngineFailed):
        return 503, error_body(text, "server_error", "engine_failed"), None
    code = "context_length_exceeded" if isinstance(error, ContextExceeded) else None
    return 400, error_body(text, "invalid_request_error", code), None
