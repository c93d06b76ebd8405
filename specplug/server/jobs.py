"""One answer to generate (a job), the output of each step for it (a delta), and the report at its end.

This module handles tokens and text; it depends on neither an engine nor HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from specplug.core import NO_OPTIONS, IntArray, SequenceOptions
from specplug.errors import SpecplugError
from specplug.generation.answers import TokenLogprobs
from specplug.generation.counters import Counters
from specplug.generation.text import Segment, TextStream


class Sampler(Protocol):
    """Samples the tokens of one answer. The engine creates it; whoever holds it last closes it."""

    @property
    def warnings(self) -> Sequence[str]:
        """What the answer need not keep of what the request demands, one line each."""

    def close(self) -> None: ...


class Stream(Protocol):
    """One running answer inside an engine.

    reading    True until the prompt is evaluated (prefill)
    cached     prompt tokens that were in the KV cache already
    fresh      tokens that the last step emitted: the accepted draft tokens, then the target's own token
    drafters   index of the proposer of each accepted draft token in `fresh`, so one entry less than `fresh`
    logprobs   one entry per token in `fresh` if the request asked for them, else empty
    prompt_logprobs
               those of the prompt's tokens from the second one on, once it is evaluated, if the request asked for them
    finish     None while the answer goes on, then "stop" or "length"
    failure    the error that ended this answer alone, such as a failed sampler
    counters   totals over the steps of this answer
    decode_ms  milliseconds of its steps that can be compared with plain decoding
    plain_ms   milliseconds that plain decoding would have taken for the same tokens, by the cost curve
    """

    reading: bool
    cached: int
    drafters: list[int]
    failure: SpecplugError | None
    decode_ms: float
    plain_ms: float

    @property
    def fresh(self) -> list[int]: ...

    @property
    def logprobs(self) -> list[TokenLogprobs]: ...

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]: ...

    @property
    def finish(self) -> str | None: ...

    @property
    def counters(self) -> Counters: ...


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of an answer, finished or not.

    cached            prompt tokens that were in the KV cache already
    queued_ms         from the request until the answer got a slot
    prompt_ms         from then until the first token
    decode_ms         from the first token until the last
    step_ms           time in steps that can be compared with plain decoding
    plain_ms          time that plain decoding would have taken for the tokens of those steps, by the cost curve
    deadline_passed   True if the deadline ended the answer
    stop_string       the stop string that ended the answer, if one did
    slot              number of the slot that answered
    """

    prompt_tokens: int
    cached: int
    counters: Counters
    completion_tokens: int
    queued_ms: float
    prompt_ms: float
    decode_ms: float
    step_ms: float
    plain_ms: float
    deadline_passed: bool = False
    stop_string: str | None = None
    slot: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """The output of one step for one answer.

    logprobs  one entry per token in `tokens` if the request asked for them
    prompt_logprobs
              on the first delta, those of the prompt's tokens from the second one on, if the request asked for them
    finish    "" while the answer goes on, then "stop" or "length"
    report    set on the last delta, unless that is an error, and on each one of a job with `reports`
    error     set on the last delta if the answer failed
    """

    segments: list[Segment] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str = ""
    report: Report | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: SpecplugError | None = None

    @property
    def is_last(self) -> bool:
        return bool(self.finish) or self.error is not None

    def followed_by(self, later: Delta) -> Delta:
        """Both deltas merged into one."""
        return Delta(
            self.segments + later.segments,
            self.tokens + later.tokens,
            self.logprobs + later.logprobs,
            later.finish,
            later.report,
            self.prompt_logprobs + later.prompt_logprobs,
        )


@dataclass(slots=True, eq=False)
class Job:
    """A prompt (int32[n], n >= 1) to answer, and the state of its answer.

    max_tokens    largest number of tokens to generate; 0 evaluates the prompt alone
    max_draft     largest number of draft tokens per step; 0 is plain decoding
    stop          strings that end the answer
    stop_tokens   ids of tokens that end the answer and are no part of its text, each with the stop string that it is
                  the control token of; None where the request gave the id
    deadline      time on the scheduler's clock, in seconds; None is no deadline
    streamed      False if the client receives the complete answer at once
    reports       True for figures with every delta
    slot          number of the slot that it has, from its start on
    cancelled     may be set from any thread; the scheduler checks it before each step
    options       what the request asks of the proposers, and whether it is private
    shown         texts of the control tokens that its answer shows; others print nothing
    tokens        generated so far
    submitted_s, started_s, first_token_s
                  times on the scheduler's clock
    """

    prompt: IntArray
    sampler: Sampler
    max_tokens: int
    max_draft: int
    stop: tuple[str, ...] = ()
    stop_tokens: Mapping[int, str | None] = field(default_factory=dict)
    deadline: float | None = None
    streamed: bool = True
    reports: bool = False
    cancelled: bool = False
    options: SequenceOptions = NO_OPTIONS
    shown: Mapping[int, bytes] = field(default_factory=dict)
    text: TextStream = field(init=False)
    stream: Stream | None = None
    slot: int = 0
    tokens: list[int] = field(default_factory=list)
    submitted_s: float = 0.0
    started_s: float = 0.0
    first_token_s: float = 0.0

    def __post_init__(self) -> None:
        self.text = TextStream(self.stop)

    @property
    def reserved_tokens(self) -> int:
        """Largest number of KV cache tokens that this answer can need."""
        return len(self.prompt) + self.max_tokens
