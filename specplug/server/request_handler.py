"""Handle one completion request: create its jobs, receive their deltas and send the response.

This module depends on neither the routes nor the way in which a prompt is built.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from time import monotonic

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from specplug.core import IntArray, SequenceOptions
from specplug.errors import UsageError
from specplug.generation.answers import Sampling, with_stop_tokens
from specplug.proposers.datastore import Datastore
from specplug.server.error_responses import ContextExceeded
from specplug.server.event_stream import EventStream, unless_disconnected
from specplug.server.jobs import Delta, Job
from specplug.server.openai_format import Choice, Json, OpenAIFormat, warning_headers
from specplug.server.request_schema import CommonRequest, SpecplugOptions
from specplug.server.scheduler import QueueFull
from specplug.server.state import State
from specplug.server.worker import Mailbox

log = logging.getLogger(__name__)

NO_LIMIT = 1 << 20
"""Draft tokens per step if the request sets no limit; the planner has its own limit."""

NOTHING_SHOWN: Mapping[int, bytes] = {}


async def handle(
    state: State,
    request: Request,
    body: CommonRequest,
    make_prompts: Callable[[], list[IntArray]],
    response_format: OpenAIFormat,
    sampling: Sampling,
    max_tokens: int | None,
    stops: Sequence[str],
    echo: bool = False,
    shown: Mapping[int, bytes] = NOTHING_SHOWN,
) -> Response:
    """Generate `body.n` answers of up to `max_tokens` tokens to each prompt, and return the response.

    `make_prompts` runs in a thread, because it tokenizes. `stops` are strings that end an answer. `echo` puts a prompt
    before each answer. `shown` has the texts of control tokens that are part of an answer's text. Raises UsageError,
    QueueFull, or HTTPException while the server shuts down.
    """
    if state.closing:
        raise HTTPException(503, "the server is shutting down; retry later")
    prompts = await asyncio.to_thread(make_prompts)
    jobs = await asyncio.to_thread(_make_jobs, state, body, prompts, sampling, max_tokens, stops, shown)
    if state.settings.log_prompts:
        for prompt in prompts:
            log.info("prompt %r", state.engine.text(prompt.tolist()))
    response_format.warnings = response_format.warnings or list(jobs[0].sampler.warnings)
    headers = warning_headers(response_format.warnings)
    try:
        running = _RunningRequest(state, jobs)
    except QueueFull:
        for job in jobs:
            job.sampler.close()
        raise
    echoed = [state.engine.text(prompt.tolist()) for prompt in prompts] if echo else []
    if body.stream:
        events = _events(running, body, response_format, len(prompts), echoed, state.engine.source_names)
        return EventStream(events, running.close, headers)

    async def complete() -> Json:
        async for choice, delta in running.deltas():
            if delta.finish and state.settings.log_prompts:
                log.info("answer %r", choice.text)
        for choice in running.choices if echoed else ():
            choice.text = echoed[choice.index // body.n] + choice.text
        return response_format.complete(running.choices, len(prompts))

    try:
        return JSONResponse(await unless_disconnected(request, complete()), headers=headers)
    finally:
        running.close()


class _RunningRequest:
    """The jobs of one request, the mailbox of their deltas, and one Choice per job."""

    def __init__(self, state: State, jobs: Sequence[Job]) -> None:
        """Submit the jobs. Raises QueueFull."""
        self._state = state
        self._indices = {job: index for index, job in enumerate(jobs)}
        self._mailbox: Mailbox = state.worker.submit(jobs)
        self.choices = [Choice(index) for index in range(len(jobs))]

    async def deltas(self) -> AsyncIterator[tuple[Choice, Delta]]:
        """Each delta with the choice that it was added to, until all are complete. Raises the error of a failed job."""
        left = len(self._indices)
        while left:
            job, delta = await self._mailbox.get()
            if delta.error is not None:
                raise delta.error
            choice = self.choices[self._indices[job]]
            choice.add(delta)
            left -= bool(delta.finish)
            yield choice, delta

    def close(self) -> None:
        """Cancel the jobs that are not complete."""
        jobs = list(self._indices)
        self._state.worker.cancel(jobs)
        self._state.metrics.forget(jobs)


def _make_jobs(
    state: State,
    body: CommonRequest,
    prompts: Sequence[IntArray],
    sampling: Sampling,
    max_tokens: int | None,
    stops: Sequence[str],
    shown: Mapping[int, bytes],
) -> list[Job]:
    """`body.n` jobs per prompt. Call it in a thread, because parsing a grammar takes time."""
    engine, options = state.engine, body.specplug
    asked = _sequence_options(engine.datastore, options, private=state.settings.private)
    max_draft = 0 if options.mode == "off" else NO_LIMIT if options.max_draft is None else options.max_draft
    seconds = options.deadline or state.settings.deadline
    deadline = monotonic() + seconds if seconds is not None else None
    sampling = with_stop_tokens(sampling, stops, engine.control_token)
    jobs: list[Job] = []
    try:
        for prompt in prompts:
            room = engine.max_context - len(prompt)
            if not len(prompt):
                raise UsageError("the prompt is empty; give at least one token")
            if room < 1:
                raise ContextExceeded(
                    f"the prompt has {len(prompt)} tokens, and the server was started with a context of "
                    f"{engine.max_context}; shorten the prompt, or start the server with a larger --context"
                )
            for index in range(body.n):
                seed = None if sampling.seed is None else (sampling.seed + index) % (2**32 - 1)
                limit = min(max_tokens or room, room)
                sampler = engine.sampler(replace(sampling, seed=seed, penalty_last_n=limit))
                streamed, stop = bool(body.stream), tuple(stops)
                job = Job(prompt, sampler, limit, max_draft, stop, deadline, streamed, options=asked, shown=shown)
                jobs.append(job)
    except BaseException:
        for job in jobs:
            job.sampler.close()
        raise
    return jobs


def _sequence_options(datastore: Datastore | None, asked: SpecplugOptions, *, private: bool) -> SequenceOptions:
    """What a request asks of the proposers. UsageError for a corpus that is not open, or not for requests."""
    offered = datastore.offered if datastore is not None else []
    for name in asked.corpora or ():
        if name not in offered:
            choice = f"use {', '.join(offered)}" if offered else "this server has none"
            raise UsageError(f"specplug.corpora: {name[:100]!r} is not open to requests; {choice}")
    return SequenceOptions(None if asked.corpora is None else tuple(asked.corpora), asked.private or private)


async def _events(
    running: _RunningRequest,
    body: CommonRequest,
    response_format: OpenAIFormat,
    num_prompts: int,
    echoed: Sequence[str],
    proposer_names: Sequence[str],
) -> AsyncIterator[Json]:
    """The bodies of a streamed response's events."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    opened: set[int] = set()
    unsent: dict[int, list[tuple[str, str | None]]] = {}  # segments whose text the format still holds back
    async for choice, delta in running.deltas():
        if choice.index not in opened:
            opened.add(choice.index)
            for first in response_format.first_chunk_choices(choice.index):
                yield response_format.chunk([first])
            if echoed:
                text = echoed[choice.index // body.n]
                yield response_format.chunk(
                    [{"index": choice.index, "text": text, "logprobs": None, "finish_reason": None}]
                )
        more_fields: Json = {"usage": None} if with_usage else {}
        if body.specplug.details:
            proposers = [None if s.source is None else proposer_names[s.source] for s in delta.segments]
            texts = [segment.text for segment in delta.segments]
            unsent.setdefault(choice.index, []).extend(zip(texts, proposers, strict=True))
        for chunk_choice in response_format.chunk_choices(choice, delta):
            segments = unsent.pop(choice.index, None)
            details: Json = {} if segments is None else {"specplug": {"index": choice.index, "segments": segments}}
            yield response_format.chunk([chunk_choice], **more_fields, **details)
    if with_usage or body.specplug.details:
        usage = response_format.usage(running.choices, num_prompts) if with_usage else None
        yield response_format.chunk([], usage=usage, specplug=response_format.speculation(running.choices))
