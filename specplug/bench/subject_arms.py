"""The arms of a comparison of servers: they are asked whole conversations, and answer with text.

A subject is one such arm, and an arm of an engine in this process is made one of them by the engine's template. The
module starts subjects again, but neither opens nor stops them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specplug.bench.arms import Arm, Result
from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.generation.counters import Counters
from specplug.subjects.simultaneous import ask_each
from specplug.subjects.subject import Message, Question, RefusedQuestion, Reply, Subject, SubjectError

Conversation = Sequence[Message]


@dataclass(frozen=True, slots=True)
class TextResult:
    """One answer as text; seconds and counters are those of `Result`, `length` its number of tokens.

    reply  that of a server; None for an engine in this process
    """

    content: str
    length: int
    seconds: float
    counters: Counters | None
    prompt_seconds: float | None
    reply: Reply | None = None


class SubjectArm:
    """A subject that has been started, or one that could not be."""

    profile = None

    def __init__(self, subject: Subject, failure: str | None = None) -> None:
        """failure: why the subject could not be started, with which every answer then fails"""
        self.name = subject.name
        self.subject = subject
        self._failure = failure
        self._was_asked = False

    def answer(self, prompts: Sequence[Conversation], max_tokens: int) -> list[TextResult | RefusedQuestion]:
        """Ask all conversations at once."""
        if self._failure is not None:
            raise SubjectError(self._failure)
        self._was_asked = True
        found = ask_each(self.subject, [Question(prompt, max_tokens) for prompt in prompts])
        seconds = iter(decode_seconds([one for one in found if isinstance(one, Reply)]))
        return [_timed(one, next(seconds)) if isinstance(one, Reply) else one for one in found]

    def reset(self) -> None:
        """Start it again, since a server keeps what it has learned until it ends. SubjectError where that fails.

        Without effect before its first answer. One at an address goes on with all that it knows.
        """
        if self._failure is not None or not self._was_asked:
            return
        try:
            self.subject.start()
        except UsageError as error:
            raise SubjectError(str(error)) from None
        self.subject.sleep()

    def close(self) -> None:
        """Without effect: whoever started the subject stops it."""


class EngineArm:
    """An arm of an engine in this process, among arms that are asked conversations."""

    def __init__(
        self, arm: Arm, encode: Callable[[Sequence[dict[str, str]]], IntArray], decode: Callable[[Sequence[int]], str]
    ) -> None:
        """encode, decode: as in `Stage`"""
        self.name = arm.name
        self.profile = arm.profile
        self._arm = arm
        self._encode = encode
        self._decode = decode

    def answer(self, prompts: Sequence[Conversation], max_tokens: int) -> list[TextResult]:
        tokens = [self._encode([dict(message) for message in prompt]) for prompt in prompts]
        return [self._as_text(one) for one in self._arm.answer(tokens, max_tokens)]

    def reset(self) -> None:
        self._arm.reset()

    def close(self) -> None:
        self._arm.close()

    def _as_text(self, result: Result) -> TextResult:
        text = self._decode(result.tokens)
        return TextResult(text, result.length, result.seconds, result.counters, result.prompt_seconds)


def decode_seconds(replies: Sequence[Reply]) -> list[float]:
    """The seconds to charge each answer for its tokens but the first.

    Of answers that were computed at once, each is charged the share of its tokens in the time from the first token of
    any of them to the last one, in which the rest of the others' prompts was read, too. Those were not all asked at the
    same moment, so the times of each count from when it was.
    """
    if len(replies) < 2:
        return [one.decode_ms / 1000 for one in replies]
    began = min(one.asked_at + one.first_ms / 1000 for one in replies)
    ended = max(one.asked_at + (one.first_ms + one.stream_ms) / 1000 for one in replies)
    tokens = sum(one.tokens - 1 for one in replies)
    return [(ended - began) * (one.tokens - 1) / max(1, tokens) for one in replies]


def _timed(reply: Reply, seconds: float) -> TextResult:
    return TextResult(reply.text, reply.tokens, seconds, _counters(reply), reply.first_ms / 1000, reply)


def _counters(reply: Reply) -> Counters | None:
    """Passes by what they yield: each one of decoding ends in a token of the target's own, after the accepted ones."""
    if reply.draft_tokens is None or reply.accepted_tokens is None:
        return None
    decoded = max(0, reply.tokens - 1)
    return Counters(
        steps=max(0, decoded - reply.accepted_tokens),
        emitted_tokens=decoded,
        draft_tokens=reply.draft_tokens,
        accepted_tokens=reply.accepted_tokens,
    )
