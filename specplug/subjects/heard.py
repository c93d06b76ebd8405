"""What has arrived of one answer, in whichever interface, and the Reply that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter

from specplug.subjects.body import Body
from specplug.subjects.subject import RefusedQuestion, Reply, SubjectError


@dataclass(frozen=True, slots=True)
class Extras:
    """What a server's answers have beside OpenAI's text. What is promised here and missing in an answer is a fault.

    usage      the number of tokens
    timings    llama-server's field `timings`
    ids        vLLM's `return_token_ids`
    switching  specplug's field that turns drafting off
    """

    usage: bool = True
    timings: bool = False
    ids: bool = False
    switching: bool = False


@dataclass(slots=True)
class Heard:
    """What has arrived of one answer.

    server    what messages call it
    asked_at  when it was asked, by `perf_counter`
    texts     by event; times: of those events, in seconds since `asked_at`
    end       seconds until the event with the reason of the end
    timings   llama-server's field; None where the answer has none
    """

    server: str
    asked_at: float = field(default_factory=perf_counter)
    texts: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    prompt_ids: Sequence[int] | None = None
    top: list[Mapping[str, float]] = field(default_factory=list)
    finish: str = ""
    end: float = 0.0
    tokens: int | None = None
    timings: Body | None = None

    def hear(self, seconds: float, text: str, ids: Sequence[int] = ()) -> None:
        """An event with text or tokens; one with neither is no part of the answer."""
        self.end = seconds
        self.ids += ids
        if text or ids:
            self.texts.append(text)
            self.times.append(seconds)

    def check(self, extras: Extras) -> None:
        """SubjectError for an answer without what earlier ones of this server had."""
        if extras.usage and self.tokens is None:
            raise SubjectError(f"{self.server}: the answer has no usage, so its number of tokens is unknown")
        if extras.timings and self.timings is None:
            raise SubjectError(f"{self.server}: the answer has no timings, which earlier answers had")

    def reply(self, *, ids: bool) -> Reply:
        """ids: whether the answer's tokens are known. RefusedQuestion for no answer."""
        if not self.times:
            raise RefusedQuestion(f"{self.server}: the answer is empty; a model that ends at once cannot be measured")
        timings = self.timings
        stream_ms = 1000 * (self.end - self.times[0])
        tokens = self.tokens if self.tokens is not None else len(self.ids) if ids else len(self.times)
        return Reply(
            text="".join(self.texts),
            tokens=tokens,
            first_ms=1000 * self.times[0],
            decode_ms=stream_ms if timings is None else timings.number("predicted_ms"),
            stream_ms=stream_ms,
            gaps_ms=tuple(1000 * (b - a) for a, b in pairwise(self.times)),
            prompt_ids=None if self.prompt_ids is None else tuple(self.prompt_ids),
            ids=tuple(self.ids) if ids else None,
            draft_tokens=None if timings is None else timings.whole("draft_n") or 0,
            accepted_tokens=None if timings is None else timings.whole("draft_n_accepted") or 0,
            top=tuple(self.top),
            finish=self.finish,
            counted=self.tokens is not None or ids,
            asked_at=self.asked_at,
        )


def timings_of(answer: Body) -> Body | None:
    """llama-server's `timings`; None for an answer without them, or with something else under this name."""
    timings = answer.fields.get("timings")
    return Body(answer.server, timings) if isinstance(timings, dict) and "predicted_ms" in timings else None


def top_of(token: Body) -> Mapping[str, float]:
    """The likeliest tokens at one place of an answer, with natural log probabilities."""
    return {one.text("token"): one.number("logprob") for one in token.parts("top_logprobs")}
