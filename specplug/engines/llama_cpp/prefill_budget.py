"""How many rows of prompts ride in a pass beside running sequences, so that none of these waits long for its token.

Knows how long steps took. Knows no engine.
A row's price follows how full the cache is, so it is learned anew with every pass. It is taken over all rows of the
pass: the first row of a prompt is much the dearest, and from its price alone no second one would seem to fit.
Keeps: a running median per number of sequences, a running mean per row, and the length that is aimed at.
"""

from __future__ import annotations

MOST_STEPS = 2.75
"""A step with a prompt in it should take no longer than so many without, so that clients, who see every delay on the
way, wait for three at most,"""

SELDOM = 0.03
"""but for this share of them."""

FIRST_STEPS = 2.0
"""What is aimed at before it is known how far steps of one size differ."""

FIRST_ROWS = 4
"""While nothing was measured."""

CAUTION = 0.1
"""By how much less is aimed at after a step that was too long. What the others give back balances at SELDOM."""

DRIFT = 0.02
"""Relative step towards what a step without prompts took. Steps of equal size up and down track a median: the last ones
before a prompt comes are disturbed by its coming."""

SMOOTHING = 0.2
"""Weight of a new price of a row."""


class PrefillBudget:
    """Learns from every step; says how many rows fit."""

    def __init__(self) -> None:
        self._step_ms: dict[int, float] = {}
        self._row_ms: float | None = None
        self._aim = FIRST_STEPS

    def rows(self, sequences: int, taken: int) -> int:
        """Rows of prompts, at least one, that may ride beside `sequences` running ones, whose own rows are `taken`."""
        step_ms = self._plain(sequences)
        if step_ms is None or self._row_ms is None:
            return FIRST_ROWS
        return max(1, round(self._aim * step_ms / self._row_ms) - taken)

    def observe(self, sequences: int, taken: int, rows: int, ms: float) -> None:
        """A step of `sequences` running ones, whose own rows were `taken`, and `rows` rows of prompts took `ms`."""
        step_ms = self._plain(sequences)
        if not rows:
            known = self._step_ms.get(sequences, ms)
            self._step_ms[sequences] = known * (1 + DRIFT * ((ms > known) - (ms < known)))
        elif step_ms is not None:
            row_ms = ms / (taken + rows)
            known = row_ms if self._row_ms is None else self._row_ms
            self._row_ms = known + (row_ms - known) * SMOOTHING
            if ms > MOST_STEPS * step_ms:
                self._aim = max(1.0, self._aim * (1 - CAUTION))
            else:
                self._aim = min(MOST_STEPS, self._aim * (1 + CAUTION * SELDOM / (1 - SELDOM)))

    def _plain(self, sequences: int) -> float | None:
        """Of the nearest number of sequences that was seen, the smaller one first: rather too short than too long."""
        smaller = [n for n in self._step_ms if n <= sequences]
        if smaller:
            return self._step_ms[max(smaller)]
        return self._step_ms[min(self._step_ms)] if self._step_ms else None
