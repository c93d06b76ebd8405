"""The cost of a target pass: milliseconds for n rows at a KV cache fill; the curve need not be monotonic.

This module starts from measured costs, or from estimated ones, which `cost_learning.py` replaces, and corrects them by
the passes that really run. It does not depend on engines, drafts or a clock.
Source: measured batch-cost curves are not linear in n (SmartSpec, arXiv 2406.14066, fits a line; here every point is
kept).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

import numpy as np

from specplug.core import FloatArray
from specplug.errors import UsageError
from specplug.planning.constants import (
    COST_TOLERANCE,
    CURVE_REFRESH,
    EARLY_EXTRA_ROWS_STEP,
    EXTRA_ROWS_RETURN,
    EXTRA_ROWS_STEP,
    FEWEST_PLAIN,
    MAX_RARE_PLAIN_STEP,
    MIN_PLAIN_INTERVAL,
    ONE_ROW_STEP,
    PLAIN_INTERVAL,
    PLAIN_SURPRISE,
    ROW_COUNT_STEP,
)
from specplug.planning.cost_learning import CostLearning


class CostCurve:
    """T(rows, context) in milliseconds, piecewise linear between measured points.

    Three corrections follow the passes that really run: one of T(1), one of the additional time of all further rows,
    and one of each row count on its own.

    contexts   tokens already in the KV cache, ascending
    rows       row counts, ascending, starting at 1
    ms         float64[len(contexts), len(rows)], each measured right after a pass of as many rows
    change_ms  additional cost of a pass whose predecessor had another row count: an engine prepares each shape anew
    learning   corrects `ms` where it is an estimate; None where it was measured
    """

    def __init__(
        self,
        contexts: Sequence[int],
        rows: Sequence[int],
        ms: Sequence[Sequence[float]],
        change_ms: float = 0.0,
        learning: CostLearning | None = None,
    ) -> None:
        """Raises UsageError if the points do not form a curve that starts at one row."""
        self.contexts = list(contexts)
        self.rows = list(rows)
        self.ms: FloatArray = np.asarray(ms, dtype=np.float64)
        ascending = self.contexts == sorted(set(self.contexts)) and self.rows == sorted(set(self.rows))
        if not ascending or not self.rows or not self.contexts or self.rows[0] != 1:
            raise UsageError("cost curve: contexts and rows must ascend, and rows must start at 1; measure again")
        if self.ms.shape != (len(self.contexts), len(self.rows)):
            raise UsageError("cost curve: ms must hold one value per context and row count; measure again")
        if not np.isfinite(self.ms).all() or (self.ms <= 0).any():
            raise UsageError("cost curve: every value must be a positive number of milliseconds; measure again")
        self.change_ms = change_ms
        self.limit = self.rows[-1]
        every = np.arange(1, self.limit + 1)
        full = np.stack([np.interp(every, self.rows, line) for line in self.ms])
        self._given = np.maximum.accumulate(full, axis=0)  # a pass over a fuller cache takes less time only by noise
        self._measured = self._given
        self._learning = learning
        self._reset_corrections()
        self._num_observed = 0
        self._num_observed_extra = 0
        self._since_plain = 0
        self._plain_interval = PLAIN_INTERVAL
        self._plain: dict[int, tuple[int, int]] = {}
        """By number of sequences: how many plain passes have run, and when the last one did, in observations."""
        if learning is not None:
            self._measured = self._given * learning.factors

    def at(self, context: int) -> list[float]:
        """Milliseconds for 1..limit rows: `at(c)[n - 1]` is T(n) with about c tokens in the cache."""
        block = context >> 7  # a block of 128 tokens; the cost in its middle stands for all of them
        corrected = self._corrected.get(block)
        if corrected is None:
            line = self._uncorrected[block] = self._line((block << 7) + 64).tolist()
            first, one, extra = line[0], self._one_row_factor * line[0], self._extra_rows_factor
            corrected = [
                (one + (ms - first) * extra) * factor for ms, factor in zip(line, self._row_count_factors, strict=True)
            ]
            self._corrected[block] = corrected
        return corrected

    def optimistic(self, context: int) -> list[float] | None:
        """As `at`, if passes are as much faster than learned as they may well be; None for a measured curve."""
        if self._learning is None:
            return None
        pairs = zip(self.at(context), self._learning.optimistic.tolist(), strict=True)
        return [ms * share for ms, share in pairs]

    @property
    def is_unscaled(self) -> bool:
        """Whether the curve is an estimate and no pass has shown yet how fast the machine is."""
        return self._learning is not None and not self._learning.has_seen

    def shows_plain(self, sequences: int) -> bool:
        """Whether plain passes of so many sequences have run recently, so that T(sequences) is their time now."""
        count, last = self._plain.get(sequences, (0, 0))
        return count >= FEWEST_PLAIN and self._num_observed - last <= 2 * PLAIN_INTERVAL

    @property
    def plain_due(self) -> bool:
        """Whether the next pass should be a plain one, as no recent pass shows the cost of plain decoding."""
        return self._since_plain >= self._plain_interval

    def observe(self, rows: int, context: int, ms: float, changed: bool = False, sequences: int = 1) -> None:
        """Correct the curve by a real pass of `sequences` sequences that took `ms`.

        changed  whether the pass before had another row count
        """
        if rows > self.limit:
            return
        if changed:
            ms -= self.change_ms
        self.at(context)
        line = self._uncorrected[context >> 7]
        if self._learning is not None and ms > 0:
            estimated = line[rows - 1] / float(self._learning.factors[rows - 1])
            if self._learning.add(rows, ms / estimated):
                self._measured = self._given * self._learning.factors
                self._reset_corrections()
                self.at(context)
                line = self._uncorrected[context >> 7]
        first, extra = line[0], line[rows - 1] - line[0]
        predicted = (first * self._one_row_factor + extra * self._extra_rows_factor) * self._row_count_factors[rows - 1]
        error = ms / predicted - 1
        sign = 0 if abs(error) < COST_TOLERANCE else 1 if error > 0 else -1
        if extra == 0.0:
            rare_step = min(ONE_ROW_STEP * self._since_plain, MAX_RARE_PLAIN_STEP, abs(error) / 2)
            self._one_row_factor *= 1 + sign * max(ONE_ROW_STEP, rare_step)
            self._extra_rows_factor += (1.0 - self._extra_rows_factor) * EXTRA_ROWS_RETURN
        else:
            self._num_observed_extra += 1
            self._extra_rows_factor *= 1 + sign * max(EXTRA_ROWS_STEP, EARLY_EXTRA_ROWS_STEP / self._num_observed_extra)
            self._one_row_factor *= 1 + sign * ROW_COUNT_STEP
            self._row_count_factors[rows - 1] *= 1 + sign * ROW_COUNT_STEP
        if extra == 0.0 or rows <= sequences:
            self._plain_pass_seen(surprised=abs(error) > PLAIN_SURPRISE)
            self._plain[rows] = self._plain.get(rows, (0, 0))[0] + 1, self._num_observed
        else:
            self._since_plain += 1
        self._num_observed += 1
        if self._num_observed % CURVE_REFRESH == 0:
            self._corrected.clear()

    @property
    def num_learned(self) -> int:
        """Passes that have corrected an estimate; 0 for a measured curve."""
        return 0 if self._learning is None else self._learning.num_passes

    def learned(self) -> tuple[list[int], list[list[float]], dict[int, float]]:
        """The contexts, the time for 1..limit rows at each, and the weight of the passes behind it, by row count."""
        assert self._learning is not None
        return self.contexts, self._measured.tolist(), self._learning.passes()

    def _plain_pass_seen(self, *, surprised: bool) -> None:
        """Shorten the interval between plain passes after a surprise; else lengthen it, up to PLAIN_INTERVAL."""
        interval = self._plain_interval
        shorter, longer = max(interval // 4, MIN_PLAIN_INTERVAL), min(2 * interval, PLAIN_INTERVAL)
        self._plain_interval = shorter if surprised else longer
        self._since_plain = 0

    def _reset_corrections(self) -> None:
        self._one_row_factor = 1.0
        self._extra_rows_factor = 1.0
        self._row_count_factors = [1.0] * self.limit
        self._uncorrected: dict[int, list[float]] = {}
        self._corrected: dict[int, list[float]] = {}

    def _line(self, context: int) -> FloatArray:
        """The measured costs of 1..limit rows at a context."""
        line: FloatArray = self._measured[0]
        if len(self.contexts) == 1 or context <= self.contexts[0]:
            return line
        right = min(bisect_left(self.contexts, context), len(self.contexts) - 1)
        left = right - 1
        span = self.contexts[right] - self.contexts[left]
        share = (context - self.contexts[left]) / span  # above 1 beyond the last point: its slope continues
        line = self._measured[left] + share * (self._measured[right] - self._measured[left])
        return line


class BatchCost:
    """T(rows, context) by the number of sequences in a pass: a curve for each batch size that was measured."""

    def __init__(self, curves: Mapping[int, CostCurve]) -> None:
        """`curves` by number of sequences; at least one."""
        self._sizes = sorted(curves)
        self._curves = [curves[size] for size in self._sizes]
        self._interpolated: dict[int, tuple[list[float], list[float], FloatArray]] = {}

    def at(self, sequences: int, context: int) -> FloatArray:
        """Milliseconds for 1, 2, ... rows, interpolated between the two nearest batch sizes; beyond the largest
        measured one its curve is used."""
        index = self._index_below(sequences)
        low = self._curves[index].at(context)
        high = self._curves[index + 1].at(context) if self._is_between(index, sequences) else low
        known = self._interpolated.get(sequences)
        if known is None or known[0] is not low or known[1] is not high:
            share = 0.0
            if high is not low:
                share = (sequences - self._sizes[index]) / (self._sizes[index + 1] - self._sizes[index])
            known = self._interpolated[sequences] = (low, high, _interpolated(low, high, share))
        return known[2]

    def plain_due(self, sequences: int) -> bool:
        """Whether the next pass should be a plain one; never for a batch size without a curve of its own, whose plain
        passes would correct none."""
        index = self._index_below(sequences)
        return self._sizes[index] == sequences and self._curves[index].plain_due

    def observe(self, sequences: int, rows: int, context: int, ms: float) -> None:
        """Correct the curve of this batch size, or by the same ratio that of the next smaller one, by a real pass."""
        index = self._index_below(sequences)
        curve = self._curves[index]
        if self._is_between(index, sequences):
            expected = self.at(sequences, context)
            if rows > min(len(expected), curve.limit):
                return
            ms *= curve.at(context)[rows - 1] / float(expected[rows - 1])
        curve.observe(rows, context, ms, sequences=sequences)

    def _index_below(self, sequences: int) -> int:
        return max(0, bisect_right(self._sizes, sequences) - 1)

    def _is_between(self, index: int, sequences: int) -> bool:
        return self._sizes[index] < sequences and index + 1 < len(self._sizes)


def _interpolated(low: Sequence[float], high: Sequence[float], share: float) -> FloatArray:
    """(1 - share) low + share high; where `low` is shorter it continues with its mean slope."""
    result = np.asarray(low)
    if share == 0.0:
        return result
    if len(result) < len(high):
        slope = (result[-1] - result[0]) / max(1, len(result) - 1)
        result = np.concatenate((result, result[-1] + slope * np.arange(1, len(high) - len(result) + 1)))
    mixed: FloatArray = (1 - share) * result[: len(high)] + share * np.asarray(high)
    return mixed


def oracle_speedup(curve: CostCurve, context: int, sequences: int = 1) -> float:
    """The speedup of perfect drafts: the maximum over n of n T(sequences) / T(n sequences)."""
    ms = curve.at(context)
    plain = ms[min(sequences, len(ms)) - 1]
    return max(n * plain / ms[n * sequences - 1] for n in range(1, max(1, len(ms) // sequences) + 1))
