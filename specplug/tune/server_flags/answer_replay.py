"""Replays recorded greedy answers through a lookup rule: which passes a server would need for them.

Knows tokens, not time, nor servers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from specplug.tune.server_flags.lookup_rules import LookupRule

UNKNOWN = -1
"""Stands for a token of an answer that the server did not report: the one that ended it."""


@dataclass(frozen=True, slots=True)
class RecordedAnswer:
    """Tokens of a prompt and of its greedy answer.

    max_tokens  the limit with which it was asked
    ended       whether the answer's last token is the model's own end of the answer
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    max_tokens: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Replayed:
    """One or several answers, replayed.

    passes  by number of rows of a pass; the pass over the prompt, which yields the first token, is not among them
    drafter_passes
            passes of the model that drafts; 0 where none does
    """

    tokens: int
    drafted: int
    accepted: int
    passes: Mapping[int, int]
    drafter_passes: int = 0

    @property
    def num_passes(self) -> int:
        return sum(self.passes.values())


def replayed(answer: RecordedAnswer, rule: LookupRule | None, *, bounded: bool = True) -> Replayed:
    """The passes for one answer; without a rule, those of plain decoding.

    bounded  whether drafts end one token before the limit of the answer's length, as llama-server's do
    A draft token behind the answer's end counts as rejected; so does the end itself where the draft goes on behind it,
    as in llama-server.
    """
    text, start = [*answer.prompt, *answer.answer], len(answer.prompt)
    passes: Counter[int] = Counter()
    drafted = accepted = 0
    known = 1
    if rule is not None:
        rule.begin(text, start)
    while known < len(answer.answer):
        place = start + known - 1
        room = answer.max_tokens - known - 1 if bounded else len(text)
        draft = rule.draft(text, place)[:room] if rule is not None and room > 0 else []
        agreeing = 0
        while agreeing < min(len(draft), len(text) - place - 1) and draft[agreeing] == text[place + 1 + agreeing]:
            agreeing += 1
        beyond = answer.ended and place + agreeing == len(text) - 1 and agreeing < len(draft)
        if draft and rule is not None:
            rule.accepted(agreeing - beyond)
        passes[1 + len(draft)] += 1
        drafted += len(draft)
        accepted += agreeing - beyond
        known += agreeing + 1
    return Replayed(len(answer.answer), drafted, accepted, dict(passes))


def total(parts: Iterable[Replayed]) -> Replayed:
    """All answers together."""
    passes: Counter[int] = Counter()
    tokens = drafted = accepted = drafter_passes = 0
    for part in parts:
        passes.update(part.passes)
        tokens, drafted, accepted = tokens + part.tokens, drafted + part.drafted, accepted + part.accepted
        drafter_passes += part.drafter_passes
    return Replayed(tokens, drafted, accepted, dict(passes), drafter_passes)
