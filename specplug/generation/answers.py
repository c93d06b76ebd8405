"""What is asked of an engine, and what comes of it: prompts, sampling, tokens, text.

Knows no engine; each says which of it it can do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from specplug.core import IntArray
from specplug.generation.counters import Counters
from specplug.generation.text import Segment


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw tokens. Defaults are greedy decoding; the other values are llama.cpp's own defaults.

    temperature    0 is greedy; top_k, top_p, min_p and seed only matter above it
    seed           None draws a new one each time
    penalty_last_n generated tokens that penalties look back on; -1 is all
    logit_bias     token id to what is added to its logit
    grammar        GBNF text, or None
    json_schema    JSON schema text, or None
    logprobs       how many alternatives to report per token; None reports nothing
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: dict[int, float] = field(default_factory=dict)
    grammar: str | None = None
    json_schema: str | None = None
    logprobs: int | None = None

    @property
    def is_argmax(self) -> bool:
        """True when the next token is the largest raw logit."""
        return (
            self.temperature <= 0
            and not self.penalises
            and not self.logit_bias
            and self.grammar is None
            and self.json_schema is None
        )

    @property
    def penalises(self) -> bool:
        return self.repeat_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities before sampling parameters: of the token, and of the likeliest alternatives."""

    logprob: float
    top: list[tuple[int, float]]


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt (int32[n], n >= 1) and how to answer it."""

    prompt: IntArray
    max_tokens: int = 128
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()


@dataclass(slots=True)
class Answer:
    """What came out.

    tokens    emitted ids, the end token included, nothing past a stop string's last token
    finish    "stop" (end token or stop string) or "length"
    seconds   from the first look at the prompt to the last token; `decode_seconds` without evaluating the prompt
    """

    tokens: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str = ""
    counters: Counters = field(default_factory=Counters)
    seconds: float = 0.0

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.counters.prompt_ns / 1e9

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)
