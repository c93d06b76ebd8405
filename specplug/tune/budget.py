"""How much time a tune has, and how it is divided among its stages.

This module counts seconds and works out how many answers fit into them. It does not depend on an engine.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from time import monotonic

from specplug.errors import UsageError

SHARES = {
    "threads": 0.02,
    "settings": 0.07,
    "cost": 0.1,
    "record": 0.21,
    "off_path_rows": 0.12,
    "expense": 0.04,
    "drafters": 0.06,
    "replay": 0.13,
}
"""Share of the budget for each stage. Confirming gets the remainder, and whatever the other stages do not use."""

CONFIRM_SHARE = 0.25
"""Share of the budget that no earlier stage may use, so that confirming always has it."""

SHORTEST_S = 5.0
"""No tune fits into less on any machine: an engine starts, and five answers are timed with drafts and without."""

FEWEST_TOKENS = 16
"""Tokens of the shortest answer that is recorded: shorter ones show too little about drafts."""


Progress = Callable[[str, float, str, float], None]
"""Receives the stage, the share of it that is done, the best setting so far, and the seconds that are left."""


class TooSmall(UsageError):
    """A stage needs more time than its share. factor: how many times as large a budget suffices; None for unknown."""

    def __init__(self, text: str, remedy: str, factor: float | None) -> None:
        self.text = text
        self.remedy = remedy
        self.factor = factor
        super().__init__(self._message("raise --budget"))

    def named(self, budget: float) -> UsageError:
        """The same for a budget of so many seconds, with one that suffices."""
        if self.factor is None:
            return self
        return UsageError(self._message(f"say --budget {in_words(self.factor * budget)}"))

    def _message(self, advice: str) -> str:
        return f"{self.text}; {advice}" + (f", or {self.remedy}" if self.remedy else "")


class Budget:
    """Counts the seconds of a tune, including those of an interrupted run that it continues."""

    def __init__(self, seconds: float, spent: float = 0.0, clock: Callable[[], float] = monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._began = clock() - spent

    @property
    def spent(self) -> float:
        return self._clock() - self._began

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def share(self, stage: str) -> float:
        """Seconds that a stage has when no earlier stage took longer than planned."""
        return SHARES[stage] * self.seconds

    def of(self, stage: str) -> float:
        """Seconds that a stage has now: its share, or less where more would cut into the time for confirming."""
        return max(0.0, min(self.share(stage), self.left - CONFIRM_SHARE * self.seconds))


def parse(text: str) -> float:
    """Seconds of `90s`, `5m`, `1.5h` or `300`. UsageError for anything else, and for what is too short for any tune."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh]?)", text.strip().lower())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"--budget {text!r}: not a time; write 90s, 5m or 1h")
    if seconds < SHORTEST_S:
        raise UsageError(f"--budget {text}: the budget is too small for any tune; say --budget 5m")
    return seconds


def answers_to_record(
    lengths: Mapping[str, Sequence[int]], max_tokens: int, *, seconds: float, prompt_ms: float, token_ms: float
) -> tuple[list[tuple[str, int]], int]:
    """The prompts to answer as (category, index), taking turns between categories, and the tokens of each answer.

    lengths    prompt tokens (all turns) of every prompt, by category
    prompt_ms  time to read one token of a prompt
    token_ms   time to generate one token of an answer

    Where time is short, prompts are dropped first, down to two per category; then answers are shortened, down to a
    quarter; then further prompts are dropped. UsageError when not even one short answer fits.
    """
    order = [
        (category, index)
        for index in range(max(map(len, lengths.values())))
        for category in lengths
        if index < len(lengths[category])
    ]

    def fitting(tokens: int) -> int:
        total = 0.0
        for count, (category, index) in enumerate(order):
            total += lengths[category][index] * prompt_ms + tokens * token_ms
            if total > seconds * 1000:
                return count
        return len(order)

    wanted = min(len(order), 2 * len(lengths))
    short = max(FEWEST_TOKENS, max_tokens // 4)
    tokens = max_tokens
    while fitting(tokens) < wanted and tokens > short:
        tokens = max(short, ceil(tokens * 0.75))
    count = fitting(tokens)
    if not count:
        category, index = order[0]
        needed = (lengths[category][index] * prompt_ms + tokens * token_ms) / 1000
        raise too_small(f"one answer of {tokens} tokens", needed, seconds, remedy="shorten the prompts")
    return order[:count], tokens


def too_small(what: str, needed: float, seconds: float, *, remedy: str = "") -> TooSmall:
    """The error for a budget that leaves `seconds` for work that needs more."""
    text = f"the budget is too small: {what} takes {needed:.1f} s, and there are {seconds:.1f} s for it"
    return TooSmall(text, remedy, needed / seconds if seconds > 0 else None)


def with_budget(command: str, seconds: float) -> str:
    """A command line of `tune` with another budget, to be run as a new tune."""
    words = shlex.split(command)
    kept = [
        word
        for place, word in enumerate(words)
        if word != "--resume" and not word.startswith("--budget") and words[max(0, place - 1)] != "--budget"
    ]
    return shlex.join([*kept, "--budget", in_words(seconds)])


def in_words(seconds: float) -> str:
    """As --budget takes it, rounded up: in steps of 30 s, above 5 minutes in minutes."""
    return f"{30 * ceil(seconds / 30)}s" if seconds <= 300 else f"{ceil(seconds / 60)}m"
