"""Generates the answers to one request: its jobs, what they have generated so far, and the bodies made of that.

This module depends neither on HTTP nor on the way in which a prompt is built.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from starlette.exceptions import HTTPException

from specplug.core import IntArray, SequenceOptions
from specplug.errors import UsageError
from specplug.generation.answers import Sampling, with_stop_tokens
from specplug.proposers.datastore import Datastore
from specplug.server.error_responses import ContextExceeded
from specplug.server.jobs import Delta, Job
from specplug.server.openai_format import Choice, Json, OpenAIFormat
from specplug.server.request_fields import ignored
from specplug.server.request_schema import CommonRequest, SpecplugOptions
from specplug.server.scheduler import AnswerFailed, QueueFull
from specplug.server.state import State
from specplug.server.timings import timings
from specplug.server.worker import Mailbox

log = logging.getLogger(__name__)

NO_LIMIT = 1 << 20
"""Draft tokens per step if the request sets no limit; the planner has its own limit."""


MOST_NAMED = 20
"""Ignored fields that a warning names at most."""


@dataclass(frozen=True, slots=True)
class Work:
    """What to generate.

    prompts     int32[n] each
    sampling    its `penalty_last_n` is -1 where penalties consider the complete answer
    max_tokens  tokens of each answer at most; None for as many as the context has room for; 0 to evaluate prompts alone
    stops       strings that end an answer
    echo        whether the prompt stands before each answer
    shown       texts of the control tokens that are part of an answer's text
    """

    prompts: Sequence[IntArray]
    sampling: Sampling
    max_tokens: int | None
    stops: Sequence[str] = ()
    echo: bool = False
    shown: Mapping[int, bytes] = field(default_factory=dict)


class Answering:
    """The answers to one request, `body.n` per prompt. Whoever opened it closes it."""

    def __init__(self, state: State, body: CommonRequest, work: Work, jobs: Sequence[Job], form: OpenAIFormat) -> None:
        """Submit the jobs. Raises QueueFull."""
        self.warnings = form.warnings
        self._state = state
        self._body = body
        self._form = form
        self._num_prompts = len(work.prompts)
        self._indices = {job: index for index, job in enumerate(jobs)}
        self._mailbox: Mailbox = state.worker.submit(jobs)
        self._choices = [Choice(index, job.prompt.tolist() if work.echo else []) for index, job in enumerate(jobs)]

    @classmethod
    async def start(
        cls, state: State, body: CommonRequest, work: Work, form: OpenAIFormat, ignored_fields: Sequence[str] = ()
    ) -> Answering:
        """Raises UsageError, QueueFull, or HTTPException while the server shuts down.

        ignored_fields  fields without a meaning of the request that `body` was translated from
        """
        if state.closing:
            raise HTTPException(503, "the server is shutting down; retry later")
        form.warnings += _check_fields(state, {*ignored(body), *ignored_fields})
        if work.sampling.min_tokens and work.sampling.constraints:
            form.warnings.append(
                "min_tokens and ignore_eos have no effect: the constraint decides where the answer ends"
            )
        jobs = await asyncio.to_thread(_make_jobs, state, body, work)
        if state.settings.log_prompts:
            for prompt in work.prompts:
                log.info("prompt %r", state.engine.text(prompt.tolist()))
        if body.constraints:  # those of a grammar of tools are known by the tools' names
            form.warnings += [text for text in jobs[0].sampler.warnings if text not in form.warnings]
        try:
            return cls(state, body, work, jobs, form)
        except QueueFull:
            for job in jobs:
                job.sampler.close()
            raise

    def close(self) -> None:
        """Cancel the jobs that are not complete."""
        jobs = list(self._indices)
        self._state.worker.cancel(jobs)
        self._state.metrics.forget(jobs)

    async def complete(self) -> Json:
        """The body of the complete response. Raises the error of a failed job."""
        try:
            async for choice, delta in self._deltas():
                if delta.finish and self._state.settings.log_prompts:
                    log.info("answer %r", choice.text)
        except AnswerFailed as failed:
            failed.texts = [choice.text for choice in self._choices]
            raise
        return self._form.complete(self._choices, self._num_prompts)

    async def chunks(self, *, usage: bool) -> AsyncIterator[Json]:
        """The bodies of a streamed response's events. Raises the error of a failed job.

        usage  whether the last one says how many tokens there were
        """
        form, body = self._form, self._body
        names = self._state.engine.source_names
        opened: set[int] = set()
        unsent: dict[int, list[tuple[str, str | None]]] = {}  # segments whose text the format still holds back
        with_usage: Json = {"usage": None} if usage else {}
        async for choice, delta in self._deltas():
            if choice.index not in opened:
                opened.add(choice.index)
                for first in form.first_chunk_choices(choice):
                    yield form.chunk([first], **with_usage)
            more_fields = dict(with_usage)
            if body.specplug.details:
                proposers = [None if s.source is None else names[s.source] for s in delta.segments]
                texts = [segment.text for segment in delta.segments]
                unsent.setdefault(choice.index, []).extend(zip(texts, proposers, strict=True))
            chunk_choices = form.chunk_choices(choice, delta)
            for place, chunk_choice in enumerate(chunk_choices, start=1):
                segments = unsent.pop(choice.index, None)
                details: Json = {} if segments is None else {"specplug": {"index": choice.index, "segments": segments}}
                if place == len(chunk_choices) and delta.report is not None:
                    details["timings"] = timings([delta.report])
                yield form.chunk([chunk_choice], **more_fields, **details)
        if usage or body.specplug.details:
            counted = form.usage(self._choices, self._num_prompts) if usage else None
            figures = {"specplug": form.speculation(self._choices), **form.timings(self._choices, self._num_prompts)}
            yield form.chunk([], usage=counted, **figures)

    async def _deltas(self) -> AsyncIterator[tuple[Choice, Delta]]:
        """Each delta with the choice that it was added to, until all are complete. Raises the error of a failed job."""
        left = len(self._indices)
        while left:
            job, delta = await self._mailbox.get()
            if delta.error is not None:
                raise delta.error
            choice = self._choices[self._indices[job]]
            choice.add(delta)
            left -= bool(delta.finish)
            yield choice, delta


def _check_fields(state: State, fields: set[str]) -> list[str]:
    """A warning of the fields of a request that have no meaning here; UsageError where the server is strict."""
    names = sorted(fields)
    if not names:
        return []
    if state.settings.strict:
        raise UsageError(f"Unrecognized request argument supplied: {names[0][:100]}")
    state.metrics.ignored_fields.inc(len(names))
    return [f"ignored: {', '.join(name[:100] for name in names[:MOST_NAMED])}"]


def _make_jobs(state: State, body: CommonRequest, work: Work) -> list[Job]:
    """`body.n` jobs per prompt. Call it in a thread, because parsing a grammar takes time."""
    engine, options = state.engine, body.specplug
    asked = _sequence_options(engine.datastore, options, private=state.settings.private)
    max_draft = 0 if options.mode == "off" else NO_LIMIT if options.max_draft is None else options.max_draft
    seconds = options.deadline or state.settings.deadline
    deadline = monotonic() + seconds if seconds is not None else None
    sampling = with_stop_tokens(work.sampling, work.stops, engine.control_token)
    common: dict[str, Any] = {"options": asked, "shown": work.shown, "reports": body.timings_per_token}
    named = {engine.control_token(stop): stop for stop in work.stops}
    common |= {"stop": tuple(work.stops), "stop_tokens": {token: named.get(token) for token in sampling.stop_tokens}}
    common |= {"streamed": bool(body.stream), "deadline": deadline}
    jobs: list[Job] = []
    try:
        for prompt in work.prompts:
            room = engine.max_context - len(prompt)
            if not len(prompt):
                raise UsageError("the prompt is empty; give at least one token")
            if room < 1:
                raise ContextExceeded(
                    f"the prompt has {len(prompt)} tokens, and the server was started with a context of "
                    f"{engine.max_context}; shorten the prompt, or start the server with a larger --context"
                )
            limit = room if work.max_tokens is None else min(work.max_tokens, room)
            penalised = limit if sampling.penalty_last_n < 0 else min(sampling.penalty_last_n, limit)
            for index in range(body.n):
                seed = None if sampling.seed is None else (sampling.seed + index) % (2**32 - 1)
                sampler = engine.sampler(replace(sampling, seed=seed, penalty_last_n=penalised))
                jobs.append(Job(prompt, sampler, limit, max_draft, **common))
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
