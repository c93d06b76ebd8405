"""What a target pass costs: milliseconds for n rows at a context fill, teeth and all.

Knows measured numbers and how to keep them honest while running. Knows no engine.
Source: measured batch-cost curves are not linear in n (SmartSpec, arXiv 2406.14066, fits a line; we keep every point).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

import numpy as np

from specplug.core import FloatArray
from specplug.errors import UsageError

DRIFT = 0.004
"""Relative step of the correction of one row per observation. Steps of equal size up and down track a median, so that
a pause of the whole machine moves the curve no further than a slow pass does."""

EXTRA_DRIFT = 0.01
"""The same for what further rows add, which follows other limits: one row waits for memory, many for arithmetic."""

EARLY = 0.1
"""The n-th observation of several rows steps by EARLY / n while that is more: a curve of another day is soon right."""

OWN_DRIFT = 0.001
"""Relative step of a row count's own correction."""

PLAIN_EVERY = 64
"""After so many passes with guesses a plain one is due: what it takes decides whether to draft at all, and no other
tells. One in 64 costs below 1% of the time."""

PLAIN_SOON = 4
"""The least of that, to which it falls while plain passes take another time than was thought."""

SURPRISE = 0.1
"""Which are those further off than this share."""

RARE_DRIFT = 0.04
"""A rare plain pass speaks for those since the last one: it steps by DRIFT for each, but no further than this, nor
than half of what it is off (or DRIFT, if that is more)."""

ROUNDING = 1e-9
"""A pass that is off by less took what was thought."""

FORGET = 0.0005
"""Share of the correction of further rows that a pass of one row takes back: a price that made drafts stop is tried
again some day."""

REFRESH = 16
"""Observations between two corrected curves: making one costs more than an observation."""


class CostCurve:
    """T(rows, context) in milliseconds, piecewise linear between measured points.

    contexts   tokens already in the KV cache, ascending
    rows       row counts, ascending, starting at 1
    ms         float64[len(contexts), len(rows)], of passes after one of as many rows
    change_ms  what a pass costs more after one of another row count: an engine prepares each shape anew
    """

    def __init__(
        self, contexts: Sequence[int], rows: Sequence[int], ms: Sequence[Sequence[float]], change_ms: float = 0.0
    ) -> None:
        """Raises UsageError when the points do not form a curve that starts at one row."""
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
        self._full = np.maximum.accumulate(full, axis=0)  # a fuller cache never costs less
        self._one = 1.0
        self._extra = 1.0
        self._own = [1.0] * self.limit
        self._observed = 0
        self._observed_extra = 0
        self._since_plain = 0
        self._plain_every = PLAIN_EVERY
        self._raw: dict[int, list[float]] = {}
        self._cached: dict[int, list[float]] = {}

    def at(self, context: int) -> list[float]:
        """Milliseconds for 1..limit rows: `at(c)[n - 1]` is T(n) with about c tokens in the cache."""
        key = context >> 7
        found = self._cached.get(key)
        if found is None:
            raw = self._raw[key] = self._line((key << 7) + 64).tolist()
            one, extra, first = self._one * raw[0], self._extra, raw[0]
            found = [(one + (ms - first) * extra) * own for ms, own in zip(raw, self._own, strict=True)]
            self._cached[key] = found
        return found

    @property
    def plain_due(self) -> bool:
        """Whether the next pass had better be plain, since for long no pass told what such a one takes."""
        return self._since_plain >= self._plain_every

    def observe(self, rows: int, context: int, ms: float, changed: bool = False, sequences: int = 1) -> None:
        """A real pass of `sequences` took `ms`: move the corrections towards it.

        changed  the one before had another row count
        """
        if rows > self.limit:
            return
        if changed:
            ms -= self.change_ms
        self.at(context)
        raw = self._raw[context >> 7]
        first, further = raw[0], raw[rows - 1] - raw[0]
        now = (first * self._one + further * self._extra) * self._own[rows - 1]
        off = ms / now - 1
        sign = 0 if abs(off) < ROUNDING else 1 if off > 0 else -1
        if further == 0.0:
            rare = min(DRIFT * self._since_plain, RARE_DRIFT, abs(off) / 2)
            self._one *= 1 + sign * max(DRIFT, rare)
            self._extra += (1.0 - self._extra) * FORGET
        else:
            self._observed_extra += 1
            self._extra *= 1 + sign * max(EXTRA_DRIFT, EARLY / self._observed_extra)
            self._one *= 1 + sign * OWN_DRIFT
            self._own[rows - 1] *= 1 + sign * OWN_DRIFT
        if further == 0.0 or rows <= sequences:
            every = self._plain_every
            self._plain_every = max(every // 4, PLAIN_SOON) if abs(off) > SURPRISE else min(2 * every, PLAIN_EVERY)
            self._since_plain = 0
        else:
            self._since_plain += 1
        self._observed += 1
        if self._observed % REFRESH == 0:
            self._cached.clear()

    def _line(self, context: int) -> FloatArray:
        line: FloatArray = self._full[0]
        if len(self.contexts) == 1 or context <= self.contexts[0]:
            return line
        right = min(bisect_left(self.contexts, context), len(self.contexts) - 1)
        left = right - 1
        span = self.contexts[right] - self.contexts[left]
        share = (context - self.contexts[left]) / span  # beyond the last point the last slope goes on
        line = self._full[left] + share * (self._full[right] - self._full[left])
        return line


class BatchCost:
    """T(rows, context) by how many sequences share the pass: a curve for each batch size that was measured."""

    def __init__(self, curves: Mapping[int, CostCurve]) -> None:
        """`curves` by sequences; at least one."""
        self._sizes = sorted(curves)
        self._curves = [curves[size] for size in self._sizes]
        self._between: dict[int, tuple[list[float], list[float], FloatArray]] = {}

    def at(self, sequences: int, context: int) -> FloatArray:
        """Milliseconds of 1.. rows: between two batches that were measured, what lies between their curves; beyond the
        largest, its curve, as far as that reaches."""
        index = self._below(sequences)
        low = self._curves[index].at(context)
        high = self._curves[index + 1].at(context) if self._inside(index, sequences) else low
        known = self._between.get(sequences)
        if known is None or known[0] is not low or known[1] is not high:
            share = 0.0
            if high is not low:
                share = (sequences - self._sizes[index]) / (self._sizes[index + 1] - self._sizes[index])
            known = self._between[sequences] = (low, high, _mixed(low, high, share))
        return known[2]

    def plain_due(self, sequences: int) -> bool:
        """Whether the next pass had better be plain; of a batch without a curve of its own none would tell."""
        index = self._below(sequences)
        return self._sizes[index] == sequences and self._curves[index].plain_due

    def observe(self, sequences: int, rows: int, context: int, ms: float) -> None:
        """A real pass took `ms`: told to the curve below, as much more or less than expected."""
        index = self._below(sequences)
        curve = self._curves[index]
        if self._inside(index, sequences):
            expected = self.at(sequences, context)
            if rows > min(len(expected), curve.limit):
                return
            ms *= curve.at(context)[rows - 1] / float(expected[rows - 1])
        curve.observe(rows, context, ms, sequences=sequences)

    def _below(self, sequences: int) -> int:
        return max(0, bisect_right(self._sizes, sequences) - 1)

    def _inside(self, index: int, sequences: int) -> bool:
        return self._sizes[index] < sequences and index + 1 < len(self._sizes)


def _mixed(low: Sequence[float], high: Sequence[float], share: float) -> FloatArray:
    """(1 - share) low + share high, `low` going on as it ends."""
    found = np.asarray(low)
    if share == 0.0:
        return found
    if len(found) < len(high):
        slope = (found[-1] - found[0]) / max(1, len(found) - 1)
        found = np.concatenate((found, found[-1] + slope * np.arange(1, len(high) - len(found) + 1)))
    mixed: FloatArray = (1 - share) * found[: len(high)] + share * np.asarray(high)
    return mixed


def oracle_speedup(curve: CostCurve, context: int, sequences: int = 1) -> float:
    """The most that perfect drafts could give: max over n of n T(sequences) / T(n sequences)."""
    ms = curve.at(context)
    plain = ms[min(sequences, len(ms)) - 1]
    return max(n * plain / ms[n * sequences - 1] for n in range(1, max(1, len(ms) // sequences) + 1))
