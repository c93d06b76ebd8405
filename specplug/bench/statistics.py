"""Confidence intervals of measured figures: tokens and seconds per prompt, or milliseconds per pass.

The module does not depend on an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specplug.core import FloatArray

RESAMPLES = 2000
"""Bootstrap samples per interval."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and its 95% interval."""

    median: float
    low: float
    high: float

    def as_mapping(self) -> dict[str, float]:
        """Plain data for JSON documents, rounded to four digits."""
        return {"median": round(self.median, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def paired_ratio(
    tokens: Sequence[float],
    seconds: Sequence[float],
    base_tokens: Sequence[float],
    base_seconds: Sequence[float],
    groups: Sequence[int] = (),
) -> Interval:
    """Tokens per second over the base's, with a bootstrap interval over prompts; item i of all lists is one prompt.

    The ratio of a resample is the ratio of its totals, so that a long answer counts by its cost. A prompt where either
    answer has no tokens is left out. Deterministic. ValueError when no prompt remains.

    groups  a number for each prompt; those with the same one were answered at once and share their time, so that they
            count as one prompt. All are on their own where it is empty
    """
    if len(groups):
        index = np.unique(groups, return_inverse=True)[1]
        tokens, seconds, base_tokens, base_seconds = (
            np.bincount(index, weights=values).tolist() for values in (tokens, seconds, base_tokens, base_seconds)
        )
    usable = [i for i, pair in enumerate(zip(tokens, base_tokens, strict=True)) if min(pair) > 0]
    if not usable:
        raise ValueError("no answer has tokens")
    picks = np.asarray(usable)[np.random.default_rng(0).integers(0, len(usable), (RESAMPLES, len(usable)))]
    speed = _totals(tokens, picks) / _totals(seconds, picks)
    base = _totals(base_tokens, picks) / _totals(base_seconds, picks)
    low, median, high = np.percentile(speed / base, [2.5, 50.0, 97.5])
    return Interval(float(median), float(low), float(high))


def _totals(values: Sequence[float], picks: npt.NDArray[np.int64]) -> FloatArray:
    totals: FloatArray = np.asarray(values, dtype=np.float64)[picks].sum(axis=1)
    return totals


def median_interval(values: Sequence[float]) -> Interval:
    """The median of one quantity with its 95% interval from order statistics; fewer than six values give their range.

    The number of values below the true median is binomial(n, 1/2); its normal approximation yields the two ranks.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    half = 0.98 * n**0.5
    low, high = max(0, int(np.floor(n / 2 - half))), min(n - 1, int(np.ceil(n / 2 + half)))
    return Interval(float(np.median(ordered)), float(ordered[low]), float(ordered[high]))
