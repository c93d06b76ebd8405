"""The interface of everything that is measured from the outside, and the types that it exchanges.

A subject is a server that specplug starts from a command, a server at an address, or specplug's own engine. Who
measures asks for whole answers to conversations, and knows nothing of processes, HTTP or flags beyond this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from specplug.errors import SpecplugError

Message = Mapping[str, str]
"""`role` and `content`, as in OpenAI's chat completions."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request: a conversation, answered greedily.

    max_tokens  of the answer, at most
    drafting    False where the request must be answered without drafts; needs `Abilities.per_request`
    top         so many likeliest tokens are reported for each token of the answer; needs `Abilities.logprobs`. Servers
                may leave them out for tokens that were drafted
    ids         the reply must have `ids`; needs `Abilities.token_ids`. Where the stream did not have all of them, the
                question is asked a second time, so set it for recording only
    """

    messages: Sequence[Message]
    max_tokens: int
    drafting: bool = True
    top: int = 0
    ids: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, with its times in milliseconds.

    text            the answer
    tokens          its length, as the server counted it; by the events of the stream where it counts nothing
    prompt_ids, ids tokens of the prompt and of the answer, its end token included; None where the server does not
                    report all of them
    first_ms        from asking to the first text, with the requests that make the prompt where there are such
    decode_ms       from the first token to the last, by the server's own timings where it has some, else by the stream
    stream_ms       the same by the clock of the stream
    gaps_ms         between the events of the stream that carried text
    draft_tokens, accepted_tokens
                    of this answer; None where the server does not report them
    top             for each token of the answer, its likeliest tokens with their log probabilities
    finish          `stop`, `length`, or what the server says; empty where the stream ended without a reason
    counted         whether `tokens` is a number of tokens, not of events
    asked_at        where `first_ms` begins, in seconds of `perf_counter`; 0 where it is not known
    """

    text: str
    tokens: int
    first_ms: float
    decode_ms: float
    stream_ms: float
    gaps_ms: tuple[float, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    ids: tuple[int, ...] | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    top: tuple[Mapping[str, float], ...] = ()
    finish: str = ""
    counted: bool = True
    asked_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a running subject can do, found out by asking it.

    kind         `llama-server`, `vllm`, `specplug`, `ollama`, `lm-studio`, `openai` for an unknown server
    version      in the server's own words; empty where it says none
    model        the name that requests carry
    slots        answers that it computes at once; None where it does not say
    context      tokens of one conversation; None where it does not say
    token_ids    whether replies have `prompt_ids` and `ids`
    timings      whether `decode_ms` is the server's own
    counters     whether replies have `draft_tokens`
    logprobs     whether `Question.top` works
    per_request  whether `Question.drafting` works
    """

    kind: str
    version: str = ""
    model: str = ""
    slots: int | None = None
    context: int | None = None
    token_ids: bool = False
    timings: bool = False
    counters: bool = False
    logprobs: bool = False
    per_request: bool = False


class SubjectError(SpecplugError):
    """A subject did not start, ended, hangs, or answered with an error.

    Measuring takes it as a result: the message has the server's own last line where there is one.
    """


class RefusedQuestion(SubjectError):
    """A subject that runs refuses this question, or its answer is empty: another one may work."""


class Subject(Protocol):
    """Something that answers. All methods raise SubjectError; `start` also UsageError for what the user has to change.

    `ask` may be called from several threads at once. `sleep` stops a subject that computes even while nobody asks it
    (by a signal; without effect where there is nothing to stop), and `wake` ends that; `ask` needs it awake.
    """

    @property
    def name(self) -> str: ...

    @property
    def abilities(self) -> Abilities:
        """Known from `start` on."""

    def start(self, flags: Sequence[str] = ()) -> None:
        """Start it with these flags after its own, and wait until it answers. A started one is stopped first.

        UsageError for flags that it cannot take, and for a command, profile or model that cannot be used.
        """

    def ask(self, question: Question) -> Reply: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def stop(self) -> None:
        """End it, and everything that it started. Never raises; without effect where it does not run."""
