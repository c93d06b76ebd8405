"""How the time of a tune is shared out.

Knows seconds. Knows no engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from time import monotonic

from specplug.errors import UsageError

SHARES = {"threads": 0.02, "cost": 0.13, "record": 0.22, "off_path_rows": 0.13, "expense": 0.04, "replay": 0.14}
"""Of the whole; what a stage leaves, and the rest, goes to confirming."""

CONFIRM_SHARE = 0.3
"""At least this much is kept for it."""

FEWEST_TOKENS = 16
"""An answer shorter than this says nothing about drafts."""


class Budget:
    """Counts a tune's seconds, those of an interrupted run before it included."""

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
        """Seconds that a stage has when all goes well."""
        return SHARES[stage] * self.seconds

    def of(self, stage: str) -> float:
        """Seconds for a stage now: its share, or less where what is left must do for the rest."""
        return max(0.0, min(self.share(stage), self.left - CONFIRM_SHARE * self.seconds))


def parse(text: str) -> float:
    """Seconds of `90s`, `5m`, `1.5h` or `300`. UsageError for anything else."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh]?)", text.strip().lower())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"--budget {text!r}: not a time; write 90s, 5m or 1h")
    return seconds


def answers_to_record(
    lengths: Mapping[str, Sequence[int]], max_tokens: int, *, seconds: float, prompt_ms: float, token_ms: float
) -> tuple[list[tuple[str, int]], int]:
    """Which prompts to answer, as (category, index), category by category in turn, and with how many tokens each.

    lengths    prompt tokens (all turns) of every prompt, by category
    prompt_ms  to read one token of a prompt      token_ms  to answer with one token

    Fewer prompts come before shorter answers, down to two per category; then shorter answers down to a quarter; then
    fewer prompts again. UsageError when not even one short answer fits.
    """
    order = [
        (kind, index)
        for index in range(max(map(len, lengths.values())))
        for kind in lengths
        if index < len(lengths[kind])
    ]

    def fitting(tokens: int) -> int:
        total = 0.0
        for count, (kind, index) in enumerate(order):
            total += lengths[kind][index] * prompt_ms + tokens * token_ms
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
        kind, index = order[0]
        one = (lengths[kind][index] * prompt_ms + tokens * token_ms) / 1000
        raise UsageError(
            f"the budget is too small: one answer of {tokens} tokens takes {one:.1f} s, and there are {seconds:.1f} s "
            "for all of them; raise --budget, or shorten the prompts"
        )
    return order[:count], tokens
