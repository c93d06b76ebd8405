"""How many rows of a prompt ride in a pass beside running sequences, so that none of these waits long for its token.

Knows how long steps took. Knows no engine.
Keeps: a running mean per number of sequences.
"""

from __future__ import annotations

MOST_STEPS = 2.5
"""A step with a prompt in it may take as long as so many without."""

FEWEST_ROWS = 4
"""So that every prompt comes to its end, and the first guess while nothing was measured."""

SMOOTHING = 0.2
"""Weight of a new timing."""


class Pace:
    """Learns from every step; says how many rows fit."""

    def __init__(self) -> None:
        self._step_ms: dict[int, float] = {}
        self._row_ms: float | None = None

    def rows(self, sequences: int) -> int:
        """Rows of prompts that may ride beside `sequences` running ones."""
        step_ms = self._plain(sequences)
        if step_ms is None or self._row_ms is None:
            return FEWEST_ROWS
        return max(FEWEST_ROWS, int((MOST_STEPS - 1) * step_ms / max(self._row_ms, 1e-6)))

    def observe(self, sequences: int, rows: int, ms: float) -> None:
        """A step of `sequences` running ones with `rows` rows of prompts took `ms`."""
        if not rows:
            known = self._step_ms.get(sequences, ms)
            self._step_ms[sequences] = known + (ms - known) * SMOOTHING
            return
        extra_ms = max(0.0, ms - (self._plain(sequences) or 0.0)) / rows
        known = extra_ms if self._row_ms is None else self._row_ms
        self._row_ms = known + (extra_ms - known) * SMOOTHING

    def _plain(self, sequences: int) -> float | None:
        """Of the nearest number of sequences that was seen, the smaller one first: rather too short than too long."""
        if sequences == 0:
            return 0.0
        smaller = [n for n in self._step_ms if n <= sequences]
        if smaller:
            return self._step_ms[max(smaller)]
        return self._step_ms[min(self._step_ms)] if self._step_ms else None
