"""One chat over OpenAI's interface, streamed, as a Reply; and what all kinds of answers make a Reply from.

It knows the bodies of /v1/chat/completions, with the fields that vLLM, llama-server and specplug add to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

from specplug.subjects.connection import Connection, Json
from specplug.subjects.subject import Question, Reply, SubjectError

CHAT = "/v1/chat/completions"


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

    asked_at  when it was asked, by `perf_counter`
    texts     by event; times: of those events, in seconds since `asked_at`
    end       seconds until the event with the reason of the end
    """

    asked_at: float = field(default_factory=perf_counter)
    texts: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    prompt_ids: Sequence[int] | None = None
    top: list[Mapping[str, float]] = field(default_factory=list)
    finish: str = ""
    end: float = 0.0
    tokens: int | None = None
    timings: Json | None = None

    def hear(self, seconds: float, text: str, ids: Sequence[int] = ()) -> None:
        """An event with text or tokens; one with neither is no part of the answer."""
        self.end = seconds
        self.ids += ids
        if text or ids:
            self.texts.append(text)
            self.times.append(seconds)

    def reply(self, name: str, *, ids: bool) -> Reply:
        """ids: whether the answer's tokens are known. SubjectError, which calls the server `name`, for no answer."""
        if not self.times:
            raise SubjectError(f"{name}: the answer is empty; a model that ends at once cannot be measured")
        timings = self.timings
        stream_ms = 1000 * (self.end - self.times[0])
        drafts = None if timings is None else _count(timings.get("draft_n", 0))
        tokens = self.tokens if self.tokens is not None else len(self.ids) if ids else len(self.times)
        return Reply(
            text="".join(self.texts),
            tokens=tokens,
            first_ms=1000 * self.times[0],
            decode_ms=stream_ms if timings is None else float(timings["predicted_ms"]),
            stream_ms=stream_ms,
            gaps_ms=tuple(1000 * (b - a) for a, b in pairwise(self.times)),
            prompt_ids=None if self.prompt_ids is None else tuple(self.prompt_ids),
            ids=tuple(self.ids) if ids else None,
            draft_tokens=drafts,
            accepted_tokens=None if timings is None else _count(timings.get("draft_n_accepted", 0)),
            top=tuple(self.top),
            finish=self.finish,
            counted=self.tokens is not None or ids,
            asked_at=self.asked_at,
        )


def ask_chat(connection: Connection, name: str, model: str, question: Question, extras: Extras) -> Reply:
    """Ask over CHAT and wait for the whole answer.

    name   what messages call the server
    model  the name that the request carries
    """
    heard = Heard()
    for event in connection.stream(CHAT, _chat_body(model, question, extras), ends_with_done=True):
        body = event.data
        if (prompt := body.get("prompt_token_ids")) is not None:
            heard.prompt_ids = prompt
        if usage := body.get("usage"):
            heard.tokens = _count(usage.get("completion_tokens"))
        if timings := body.get("timings"):
            heard.timings = checked_timings(timings)
        for choice in body.get("choices") or ():
            delta = choice.get("delta") or {}
            text = "".join(delta.get(key) or "" for key in ("reasoning_content", "reasoning", "content"))
            heard.hear(event.seconds, text, choice.get("token_ids") or ())
            content = (choice.get("logprobs") or {}).get("content") or ()
            heard.top += [top_of(one) for one in content]
            heard.finish = choice.get("finish_reason") or heard.finish
    check_complete(name, heard, extras)
    return heard.reply(name, ids=extras.ids)


def check_complete(name: str, heard: Heard, extras: Extras) -> None:
    """SubjectError for an answer without what earlier ones of this server had."""
    if extras.usage and heard.tokens is None:
        raise SubjectError(f"{name}: the answer has no usage, so its number of tokens is unknown")
    if extras.timings and heard.timings is None:
        raise SubjectError(f"{name}: the answer has no timings, which earlier answers had")


def checked_timings(timings: Any) -> Json | None:
    """llama-server's `timings`; None for something else under this name."""
    known = isinstance(timings, dict) and isinstance(timings.get("predicted_ms"), int | float)
    return timings if known else None


def top_of(token: Json) -> Mapping[str, float]:
    """The likeliest tokens at one place of an answer, with natural log probabilities."""
    return {str(one.get("token", "")): float(one["logprob"]) for one in token.get("top_logprobs") or ()}


def _chat_body(model: str, question: Question, extras: Extras) -> Json:
    body: Json = {
        "model": model,
        "messages": [dict(message) for message in question.messages],
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if question.top:
        body |= {"logprobs": True, "top_logprobs": question.top}
    if extras.ids:
        body["return_token_ids"] = True
    if extras.switching:
        body["specplug"] = {"mode": "auto" if question.drafting else "off"}
    return body


def _count(number: object) -> int | None:
    return number if isinstance(number, int) else None
