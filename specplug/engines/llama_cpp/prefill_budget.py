"""How many rows of prompts ride in a pass beside running sequences, so that none of these waits long for its token.

Knows how long steps took. Knows no engine.
A row's price follows how full the cache is, so it is learned anew with every pass. It is taken over all rows of the
pass: the first row of a prompt is much the dearest, and from its price alone no second one would seem to fit.
Keeps: a running median per number of sequences, a running mean per row, and the length that is aimed at.
"""

from __future__ import annotations

from specplug.planning.constants import (
    PREFILL_FIRST_ROWS,
    PREFILL_FIRST_STEPS,
    PREFILL_LATE_SHARE,
    PREFILL_MAX_STEPS,
    PREFILL_REDUCTION,
    PREFILL_ROW_WEIGHT,
    PREFILL_STEP_DRIFT,
)


class PrefillBudget:
    """Learns from every step; says how many rows fit."""

    def __init__(self) -> None:
        self._step_ms: dict[int, float] = {}
        self._row_ms: float | None = None
        self._aim = PREFILL_FIRST_STEPS

    def rows(self, sequences: int, taken: int) -> int:
        """Rows of prompts, at least one, that may ride beside `sequences` running ones, whose own rows are `taken`."""
        step_ms = self._plain(sequences)
        if step_ms is None or self._row_ms is None:
            return PREFILL_FIRST_ROWS
        return max(1, round(self._aim * step_ms / self._row_ms) - taken)

    def observe(self, sequences: int, taken: int, rows: int, ms: float) -> None:
        """A step of `sequences` running ones, whose own rows were `taken`, and `rows` rows of prompts took `ms`."""
        step_ms = self._plain(sequences)
        if not rows:
            known = self._step_ms.get(sequences, ms)
            self._step_ms[sequences] = known * (1 + PREFILL_STEP_DRIFT * ((ms > known) - (ms < known)))
        elif step_ms is not None:
            row_ms = ms / (taken + rows)
            known = row_ms if self._row_ms is None else self._row_ms
            self._row_ms = known + (row_ms - known) * PREFILL_ROW_WEIGHT
            if ms > PREFILL_MAX_STEPS * step_ms:
                self._aim = max(1.0, self._aim * (1 - PREFILL_REDUCTION))
            else:
                recovery = PREFILL_REDUCTION * PREFILL_LATE_SHARE / (1 - PREFILL_LATE_SHARE)
                self._aim = min(PREFILL_MAX_STEPS, self._aim * (1 + recovery))

    def _plain(self, sequences: int) -> float | None:
        """Of the nearest number of sequences that was seen, the smaller one first: rather too short than too long."""
        smaller = [n for n in self._step_ms if n <= sequences]
        if smaller:
            return self._step_ms[max(smaller)]
        return self._step_ms[min(self._step_ms)] if self._step_ms else None
