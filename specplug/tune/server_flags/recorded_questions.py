"""The questions of a tune of a server, and the plain answers that were recorded to them.

Knows the workload's prompts and replies; asks nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specplug.bench.workloads import Prompt
from specplug.subjects.subject import Question, Reply
from specplug.tune.server_flags.answer_replay import UNKNOWN, RecordedAnswer


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """A question of the workload. key: names it in the journal; category: the kind of work."""

    key: str
    category: str
    question: Question


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer: tokens behind the first, milliseconds for them, milliseconds to the first, and between the events."""

    tokens: int
    ms: float
    first_ms: float
    gaps_ms: tuple[float, ...] = ()
    drafted: int | None = None
    accepted: int | None = None

    @property
    def values(self) -> tuple[float, float]:
        """Tokens and seconds, as `Pairs` adds them."""
        return float(self.tokens), self.ms / 1000

    def packed(self) -> list[Any]:
        """As plain data, from which `Timed(*packed)` makes it again."""
        gaps = [round(gap, 2) for gap in self.gaps_ms]
        return [self.tokens, round(self.ms, 3), round(self.first_ms, 3), gaps, self.drafted, self.accepted]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One question with its plain answer; `tokens` is None where the server reports no token ids."""

    asked: AskedQuestion
    text: str
    timed: Timed
    tokens: RecordedAnswer | None


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation, whose earlier ones have been answered."""

    key: str
    category: str
    prompt: str
    texts: tuple[str, ...]

    def question(self, answers: Sequence[str], max_tokens: int) -> AskedQuestion:
        """The question with the answers to the earlier turns."""
        messages: list[dict[str, str]] = []
        for place, text in enumerate(self.texts):
            messages.append({"role": "user", "content": text})
            if place < len(self.texts) - 1:
                messages.append({"role": "assistant", "content": answers[place]})
        return AskedQuestion(self.key, self.category, Question(tuple(messages), max_tokens))


def turns_of(prompts: Sequence[Prompt]) -> Iterator[Turn]:
    """All turns: categories take turns, and the turns of a conversation follow each other."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    for place in range(max(map(len, by_category.values()))):
        for category, own in by_category.items():
            if place < len(own):
                prompt = own[place]
                for turn in range(len(prompt.turns)):
                    yield Turn(f"{prompt.id}/{turn}", category, prompt.id, prompt.turns[: turn + 1])


def timed(reply: Reply) -> Timed:
    return Timed(
        max(0, reply.tokens - 1),
        reply.decode_ms,
        reply.first_ms,
        reply.gaps_ms,
        reply.draft_tokens,
        reply.accepted_tokens,
    )


def as_entry(key: str, reply: Reply) -> dict[str, Any]:
    """A plain answer as plain data for the journal."""
    return {
        "key": key,
        "text": reply.text,
        "timed": timed(reply).packed(),
        "prompt_ids": None if reply.prompt_ids is None else list(reply.prompt_ids),
        "ids": None if reply.ids is None else list(reply.ids),
        "finish": reply.finish,
    }


def from_entry(one: AskedQuestion, entry: Mapping[str, Any]) -> Recorded:
    """The inverse of `as_entry`."""
    found = Timed(*entry["timed"])
    if entry["prompt_ids"] is None or entry["ids"] is None:
        return Recorded(one, entry["text"], found, None)
    unknown = max(0, found.tokens + 1 - len(entry["ids"]))
    answer = (*entry["ids"], *[UNKNOWN] * unknown)
    ended = entry["finish"] == "stop"
    tokens = RecordedAnswer(tuple(entry["prompt_ids"]), answer, one.question.max_tokens, ended)
    return Recorded(one, entry["text"], found, tokens)


def further_questions(prompts: Sequence[Prompt], recorded: Sequence[Recorded], max_tokens: int) -> list[AskedQuestion]:
    """The first turns for which there was no time when plain answers were recorded; later turns need those answers."""
    known = {one.asked.key for one in recorded}
    return [
        turn.question([], max_tokens) for turn in turns_of(prompts) if len(turn.texts) == 1 and turn.key not in known
    ]


def grouped(questions: Sequence[AskedQuestion], size: int) -> list[list[AskedQuestion]]:
    """Questions that are asked at once: `size` of them, as often as they suffice."""
    return [list(questions[at : at + size]) for at in range(0, len(questions) - size + 1, size)]


def level_of(groups: Sequence[Sequence[AskedQuestion]]) -> int:
    """The number of questions that are asked at once in each of the groups; 0 where there are none."""
    return len(groups[0]) if groups else 0
