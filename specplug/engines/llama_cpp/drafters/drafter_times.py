"""What the passes of a drafter take: timed when it is opened, then corrected by those that run.

Works on milliseconds, and does not depend on a context.
"""

from __future__ import annotations

import numpy as np

LEAST_PASS_RATIO = 0.75
"""A pass that is timed while nothing is drafted cannot lower the cost below this share of it: it is one pass, after a
shorter text than usual."""

COPIED_BYTES_PER_MS = 1e6
"""Expected speed of copying cells before it was measured."""

TIMED_READ = 16
"""Tokens read at once from which the time per token is measured; fewer take about as long as one."""

RISE = 0.2
"""Largest relative rise of the expected time per token read by one measurement, so that a pause of the machine does not
keep the drafter from being asked. A shorter time replaces it at once."""

DRIFT = 0.01
"""Relative step towards a new timing of a draft token. Steps of equal size track a median, which no pause moves far."""

EARLY_DRIFT = 0.1
"""The n-th timing moves the cost by this over n, as long as that is more than DRIFT: on an empty cache, right after
passes of its own, the drafter was timed at 3.4 ms where a token in use took 5.0 (Gemma-3-270M iq4_nl, 32,768 rows)."""

SCORE_PRICE = 1.5
"""Expected time of a row in a pass that scores, relative to a row that is only read: it has logits."""


class DrafterTimes:
    """Milliseconds.

    read_token_ms    per token read
    copied_token_ms  per cell that is copied from the target
    score_row_ms     per row of a pass that scores
    """

    def __init__(self, slots: int, cell_bytes: int) -> None:
        """`cell_bytes` is the size of a cell that is copied from the target."""
        self.read_token_ms = 0.0
        self.score_row_ms = 0.0
        self.copied_token_ms = self._first_copied_ms = cell_bytes / COPIED_BYTES_PER_MS
        self._pass_ms = [0.0] * slots
        self._num_passes = 0

    def pass_ms(self, rows: int) -> float:
        """Time to draft a token for each of so many sequences in one pass."""
        return self._pass_ms[min(rows, len(self._pass_ms)) - 1]

    def set_passes(self, one_ms: float, all_ms: float) -> None:
        """The time of a pass over one row, and of one with a row for each slot; rows between are interpolated."""
        slots = len(self._pass_ms)
        self._pass_ms = np.interp(range(1, slots + 1), (1, max(slots, 2)), (one_ms, all_ms)).tolist()

    def set_reading(self, token_ms: float) -> None:
        self.read_token_ms = token_ms
        self.score_row_ms = SCORE_PRICE * token_ms

    def forget_copies(self) -> None:
        self.copied_token_ms = self._first_copied_ms

    def drafted(self, rows: int, ms: float) -> None:
        """A pass drafted a token for so many sequences; it corrects the costs of all numbers of rows alike."""
        self._num_passes += 1
        step = max(DRIFT, EARLY_DRIFT / self._num_passes)
        self._scale(1 + step if ms > self.pass_ms(rows) else 1 - step)

    def timed(self, ms: float) -> None:
        """A pass of one row was timed while nothing is drafted; it can only lower the cost."""
        if ms < self._pass_ms[0]:
            self._scale(max(ms / self._pass_ms[0], LEAST_PASS_RATIO))

    def read(self, tokens: int, ms: float) -> None:
        if tokens >= TIMED_READ:
            self.read_token_ms = _followed(self.read_token_ms, ms / tokens)

    def copied(self, cells: int, ms: float) -> None:
        self.copied_token_ms = _followed(self.copied_token_ms, ms / cells)

    def scored(self, rows: int, ms: float) -> None:
        """Reading takes no longer than a row of a pass that scores, which has logits."""
        self.score_row_ms = _followed(self.score_row_ms, ms / rows)
        self.read_token_ms = min(self.read_token_ms, ms / rows)

    def _scale(self, ratio: float) -> None:
        self._pass_ms = [known * ratio for known in self._pass_ms]


def _followed(known_ms: float, ms: float) -> float:
    """The expected time per token after one more measurement."""
    return ms if not known_ms or ms < known_ms else min(ms, known_ms * (1 + RISE))
