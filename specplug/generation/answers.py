"""Requests and answers: a prompt with its sampling parameters, and the tokens and text generated for it.

This module does not depend on an engine; each engine states which parameters it supports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from specplug.core import IntArray
from specplug.generation.counters import Counters
from specplug.generation.text import Segment

LEAST_TEMPERATURE = 1e-30
"""Below it, logits divided by the temperature exceed the numbers of float32."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are sampled. The default is greedy decoding; all other defaults are llama.cpp's own.

    temperature    0 is greedy decoding, as is one that is so small that it has the same effect; top_k, top_p, min_p,
                   typical_p and seed only have an effect above
    seed           None draws a new seed for each request
    penalty_last_n number of latest generated tokens that the penalties consider; -1 is all
    logit_bias     maps token ids to a value that is added to their logits
    grammar        GBNF text; json_schema: JSON schema text; regex: regular expression; lark: grammar of llguidance's
                   dialect of Lark. At most one of them constrains the answer
    strict         what of `json_schema` cannot be enforced is refused; otherwise it is ignored, with a warning
    logprobs       number of alternatives to report per token; None reports no log probabilities
    prompt_logprobs
                   the same for the tokens of the prompt
    stop_tokens    ids of tokens that end the answer, beside the model's own
    min_tokens     tokens before which the answer does not end; without effect where a grammar or schema constrains it
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    seed: int | None = None
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: dict[int, float] = field(default_factory=dict)
    grammar: str | None = None
    json_schema: str | None = None
    regex: str | None = None
    lark: str | None = None
    strict: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)

    @property
    def is_argmax(self) -> bool:
        """True if the next token is always the one with the largest raw logit, of those that a constraint allows."""
        return self.temperature <= 0 and not self.penalises and not self.logit_bias

    @property
    def constraints(self) -> list[str]:
        """The names of the fields that constrain the answer, one at most where the parameters are right."""
        return [name for name in ("grammar", "json_schema", "regex", "lark") if getattr(self, name) is not None]

    @property
    def penalises(self) -> bool:
        return self.repeat_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log probabilities, without sampling parameters: of the token, and of the most likely alternatives."""

    logprob: float
    top: list[tuple[int, float]]


def with_stop_tokens(sampling: Sampling, stops: Sequence[str], control_token: Callable[[str], int | None]) -> Sampling:
    """The parameters with a stop token for every stop string that is the text of a control token, which prints nothing.

    control_token  the control token whose text is given; None where there is none
    """
    found = [control_token(stop) for stop in stops]
    tokens = frozenset(token for token in found if token is not None)
    return replace(sampling, stop_tokens=sampling.stop_tokens | tokens) if tokens else sampling


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt (int32[n], n >= 1) and how to answer it. Generation ends at any of the strings in `stop`.

    private  nothing of it may be kept when the process ends
    """

    prompt: IntArray
    max_tokens: int = 128
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    private: bool = False


@dataclass(slots=True)
class Answer:
    """The result of a request.

    tokens    emitted ids: the end token is included, tokens after the one that completes a stop string are not
    segments  the text
    finish    "stop" (end token or stop string) or "length"; empty while generating
    seconds   from the start of reading the prompt to the last token; `decode_seconds` is without reading the prompt
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
