"""One answer that somebody waits for: what is asked, what came in a step, and what it took.

Knows tokens and text. Knows neither engines nor HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from specplug.core import IntArray
from specplug.errors import SpecplugError
from specplug.generation.answers import TokenLogprobs
from specplug.generation.counters import Counters
from specplug.generation.text import Segment, TextStream


class Sampler(Protocol):
    """Draws one answer's tokens; the engine knows how."""

    def close(self) -> None: ...


class Stream(Protocol):
    """An answer under way in an engine; `fresh` is what the last step emitted, all but the last of it guessed.

    guessers  the proposer, by index, of each guess in `fresh`
    """

    reading: bool
    cached: int
    guessers: list[int]
    failure: SpecplugError | None
    decode_ms: float
    plain_ms: float

    @property
    def fresh(self) -> list[int]: ...

    @property
    def logprobs(self) -> list[TokenLogprobs]: ...

    @property
    def finish(self) -> str | None: ...

    @property
    def counters(self) -> Counters: ...


@dataclass(frozen=True, slots=True)
class Report:
    """What an answer took. Milliseconds of waiting, of reading the prompt, and of everything after the first token.

    cached   tokens of the prompt that were known already
    step_ms  of steps that read no prompt; plain decoding would have taken `plain_ms`, by the cost curve
    late     its deadline came first
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
    late: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step brought for one answer.

    logprobs  for each of `tokens`, where they were asked for
    finish    "" while more comes, then "stop" or "length"
    report    with the last one, unless there is an error
    """

    segments: list[Segment] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str = ""
    report: Report | None = None
    error: SpecplugError | None = None

    def followed_by(self, later: Delta) -> Delta:
        """Both as one."""
        return Delta(
            self.segments + later.segments,
            self.tokens + later.tokens,
            self.logprobs + later.logprobs,
            later.finish,
            later.report,
        )


@dataclass(slots=True, eq=False)
class Job:
    """A prompt (int32[n], n >= 1) to be answered.

    max_draft  most guesses in a step; 0 is plain decoding
    deadline   on the scheduler's clock, in seconds; None is never
    streamed   whether anyone waits for less than the whole answer
    cancelled  set by anyone, seen before the next step
    """

    prompt: IntArray
    sampler: Sampler
    max_tokens: int
    max_draft: int
    stop: tuple[str, ...] = ()
    deadline: float | None = None
    streamed: bool = True
    cancelled: bool = False
    text: TextStream = field(init=False)
    stream: Stream | None = None
    emitted: int = 0
    submitted: float = 0.0
    started: float = 0.0
    first: float = 0.0

    def __post_init__(self) -> None:
        self.text = TextStream(self.stop)

    @property
    def reserved_tokens(self) -> int:
        """Tokens that it may come to hold in the cache."""
        return len(self.prompt) + self.max_tokens
