"""Learns the time of a pass over n rows from the passes that run, beginning with an estimate.

The logarithm of measured over estimated time is a Gaussian process over log2(n): what one row count shows holds, less
certainly, for its neighbours. It does not depend on engines, drafts, contexts or a clock.
Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), equations 2.23 and 2.24.
State: three numbers per row count that has run, and two arrays of `limit` factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, log

import numpy as np

from specplug.core import FloatArray, IntArray
from specplug.planning.constants import (
    COST_BLOCK_SHARE,
    COST_DRIFT,
    COST_FIRST_NOISE,
    COST_NOISE,
    COST_OUTLIER,
    COST_ROW_SPREAD,
    COST_SCALE_SPREAD,
    COST_WEIGHT_LIMIT,
    LARGEST_BLOCK,
    OPTIMISM,
    REMEMBERED_WEIGHT,
)


@dataclass(slots=True)
class _Seen:
    """The passes over one row count: the mean of log(measured / estimated), their weight, and when the last one ran."""

    mean: float
    weight: float
    last: int


def _variance(seen: _Seen, now: int) -> float:
    """Of the mean of a row count: a single pass shows little, since it may have been disturbed."""
    return COST_NOISE**2 / seen.weight + COST_FIRST_NOISE**2 / seen.weight**2 + COST_DRIFT**2 * (now - seen.last)


class CostLearning:
    """The factor between measured and estimated time, for 1 to `limit` rows.

    limit   most rows
    spread  how far the shape of the estimated curve may be off: the standard deviation of the logarithm of a factor
            between row counts that are far apart
    known   number of earlier passes by row count, by which the estimate itself was measured
    """

    def __init__(self, limit: int, *, spread: float, known: Mapping[int, float] | None = None) -> None:
        self._spread = spread
        rows = np.arange(1, limit + 1)
        self._x = np.log2(rows.astype(np.float64))
        self._blocks = np.minimum(np.log2((rows & -rows).astype(np.float64)), LARGEST_BLOCK)
        self._seen = {
            rows: _Seen(0.0, min(count, REMEMBERED_WEIGHT), 0)
            for rows, count in (known or {}).items()
            if 1 <= rows <= limit and count > 0
        }
        self._num_passes = 0
        self._due = 0
        self._solve()

    @property
    def num_passes(self) -> int:
        """Passes of this process."""
        return self._num_passes

    @property
    def has_seen(self) -> bool:
        """Whether any pass is known, of this process or an earlier one."""
        return bool(self._seen)

    def passes(self) -> dict[int, float]:
        """The weight of the passes that were seen, by row count."""
        return {rows: round(seen.weight, 2) for rows, seen in sorted(self._seen.items())}

    def add(self, rows: int, ratio: float) -> bool:
        """Learn from a pass over `rows` rows that took `ratio` times the estimate. True if the factors have changed.

        They change at the first pass of a row count, and after 1, 2, 4, ... and then every 32 passes.
        """
        self._num_passes += 1
        value, seen = log(ratio), self._seen.get(rows)
        if seen is None:
            self._seen[rows] = _Seen(self._clipped(rows, value), 1.0, self._num_passes)
            self._due = 0
        else:
            if seen.weight >= 2.0:
                value = min(max(value, seen.mean - COST_OUTLIER), seen.mean + COST_OUTLIER)
            age = self._num_passes - seen.last
            seen.weight /= 1 + seen.weight * age * (COST_DRIFT / COST_NOISE) ** 2
            seen.weight = min(seen.weight, COST_WEIGHT_LIMIT) + 1.0
            seen.mean += (value - seen.mean) / seen.weight
            seen.last = self._num_passes
        if self._num_passes < self._due:
            return False
        self._due = self._num_passes + min(self._num_passes, 32)
        self._solve()
        return True

    @property
    def factors(self) -> FloatArray:
        """float64[limit]: by how much to multiply the estimated time of 1, 2, ... rows."""
        return self._factors

    @property
    def optimistic(self) -> FloatArray:
        """float64[limit]: the share of the learned time that a pass takes if it is OPTIMISM standard deviations
        faster."""
        return self._optimistic

    def _solve(self) -> None:
        limit = len(self._x)
        if not self._seen:
            self._factors, self._optimistic = np.ones(limit), np.ones(limit)
            self._mean, self._deviation = np.zeros(limit), np.full(limit, inf)
            return
        rows = np.array(sorted(self._seen), dtype=np.int32) - 1
        seen = [self._seen[row + 1] for row in rows.tolist()]
        noise = np.array([_variance(s, self._num_passes) for s in seen])
        known = self._covariance(rows, rows)
        np.fill_diagonal(known, known.diagonal() + COST_ROW_SPREAD**2 + noise)
        cross = self._covariance(np.arange(limit, dtype=np.int32), rows)
        cross[rows, np.arange(len(rows))] += COST_ROW_SPREAD**2
        solved = np.linalg.solve(known, cross.T)
        mean = solved.T @ np.array([s.mean for s in seen])
        own = COST_SCALE_SPREAD**2 + self._spread**2 + self._block_spread**2 + COST_ROW_SPREAD**2
        variance = np.maximum(own - np.einsum("ij,ji->i", cross, solved), 0.0)
        self._mean, self._deviation = mean, np.sqrt(variance)
        self._factors, self._optimistic = np.exp(mean), np.exp(-OPTIMISM * self._deviation)

    def _clipped(self, rows: int, value: float) -> float:
        """The first value of a row count, no further from what is expected than is likely: it may be a pause."""
        reach = 2.0 * float(self._deviation[rows - 1])
        expected = float(self._mean[rows - 1])
        return min(max(value, expected - reach), expected + reach)

    @property
    def _block_spread(self) -> float:
        return COST_BLOCK_SHARE * self._spread

    def _covariance(self, one: IntArray, other: IntArray) -> FloatArray:
        """Between indices of row counts: a common factor of any size; a shape whose correlation falls by exp(-1/2) per
        doubling of the rows; and a factor of those that are divisible by the same power of two, as kernels compute rows
        in blocks."""
        distance = self._x[one][:, None] - self._x[other][None, :]
        blocks = np.abs(self._blocks[one][:, None] - self._blocks[other][None, :])
        covariance: FloatArray = (
            COST_SCALE_SPREAD**2
            + self._spread**2 * np.exp(-(distance**2) / 2)
            + self._block_spread**2 * np.exp(-blocks)
        )
        return covariance
