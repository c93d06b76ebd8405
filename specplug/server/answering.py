"""One request's answers, from its prompts to what is sent.

Knows jobs, deltas and the order of things. Knows neither paths nor how a prompt is made.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from time import monotonic

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.generation.answers import Sampling
from specplug.server.jobs import Delta, Job
from specplug.server.refusals import ContextExceeded
from specplug.server.request_schema import Common
from specplug.server.scheduler import QueueFull
from specplug.server.shapes import Choice, Json, Shape
from specplug.server.state import State
from specplug.server.streams import EventStream, unless_gone
from specplug.server.worker import Mailbox

log = logging.getLogger(__name__)

NO_LIMIT = 1 << 20
"""Guesses per step where the client names no limit; the planner has its own."""


async def answer(
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
        answering = _Answering(state, jobs)
    except QueueFull:
        for job in jobs:
            job.sampler.close()
        raise
    echoed = [state.engine.text(prompt.tolist()) for prompt in prompts] if echo else []
    if asked.stream:
        return EventStream(
            _events(answering, asked, shape, len(prompts), echoed, state.engine.source_names), answering.close
        )

    async def whole() -> Json:
        async for choice, delta in answering.deltas():
            if delta.finish and state.settings.log_prompts:
                log.info("answer %r", choice.text)
        for choice in answering.choices if echoed else ():
            choice.text = echoed[choice.index // asked.n] + choice.text
        return shape.whole(answering.choices, len(prompts))

    try:
        return JSONResponse(await unless_gone(request, whole()))
    finally:
        answering.close()


class _Answering:
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
    answering: _Answering, asked: Common, shape: Shape, prompts: int, echoed: Sequence[str], names: Sequence[str]
) -> AsyncIterator[Json]:
    """The pieces of a streamed answer; `names` are the proposers'."""
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
            guessers = [None if s.source is None else names[s.source] for s in delta.segments]
            texts = [segment.text for segment in delta.segments]
            further["specplug"] = {"index": choice.index, "segments": list(zip(texts, guessers, strict=True))}
        for piece in shape.piece(choice, delta):
            yield shape.chunk([piece], **further)
            further.pop("specplug", None)  # once
    if with_usage or asked.specplug.details:
        usage = shape.usage(answering.choices, prompts) if with_usage else None
        yield shape.chunk([], usage=usage, specplug=shape.figures(answering.choices))
