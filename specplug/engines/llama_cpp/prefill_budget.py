"""Limits the rows of prompts that a pass reads beside running sequences, so that none of these waits long for a token.

Learns from the times of steps, and does not depend on an engine.
The time per row grows with the tokens in the cache, so every pass updates it. It is the mean over all rows of a pass:
the first row of a prompt is by far the most expensive, and judged by it alone a second row would never seem to fit.
State: a running median of the step time per number of sequences, a running mean of the time per row, and the intended
step time.
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
    """Learns from every step how many rows of prompts fit into the next one."""

    def __init__(self) -> None:
        self._step_ms: dict[int, float] = {}
        self._row_ms: float | None = None
        self._aim = PREFILL_FIRST_STEPS

    def rows(self, sequences: int, taken: int) -> int:
        """Rows of prompts, at least one, that fit beside `taken` rows of `sequences` running sequences."""
        step_ms = self._plain_ms(sequences)
        if step_ms is None or self._row_ms is None:
            return PREFILL_FIRST_ROWS
        return max(1, round(self._aim * step_ms / self._row_ms) - taken)

    def observe(self, sequences: int, taken: int, rows: int, ms: float) -> None:
        """Record the time `ms` of a step: `taken` rows of `sequences` running sequences, `rows` rows of prompts."""
        step_ms = self._plain_ms(sequences)
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

    def _plain_ms(self, sequences: int) -> float | None:
        """The time of a step without prompts, for the nearest number of sequences with a measurement.

        A smaller number is preferred, since it keeps steps short. None before the first measurement.
        """
        smaller = [n for n in self._step_ms if n <= sequences]
        if smaller:
            return self._step_ms[max(smaller)]
        return self._step_ms[min(self._step_ms)] if self._step_ms else None
