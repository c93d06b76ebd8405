"""Confidence intervals of measured figures: tokens and seconds per prompt, or milliseconds per pass.

The module does not depend on an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

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
    *,
    expanded: bool = False,
) -> Interval:
    """Tokens per second over the base's, with a bootstrap interval over prompts; item i of all lists is one prompt.

    The ratio of a resample is the ratio of its totals, so that a long answer counts by its cost. A prompt where either
    answer has no tokens is left out. Deterministic. ValueError when no prompt remains.

    groups    a number for each prompt; those with the same one were answered at once and share their time, so that they
              count as one prompt. All are on their own where it is empty
    expanded  whether the interval is the expanded percentile interval, see `expanded_tail`
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
    tail = 100 * expanded_tail(len(usable)) if expanded else 2.5
    low, median, high = np.percentile(speed / base, [tail, 50.0, 100 - tail])
    return Interval(float(median), float(low), float(high))


def expanded_tail(n: int) -> float:
    """The share of resamples on each side of a 95% interval from n values; 0.025 for one value, and for very many.

    Percentile intervals of few values are too narrow: a bootstrap divides the variance by n in place of n - 1, and has
    a normal tail in place of Student's t. Source: the expanded percentile interval of Hesterberg, "What Teachers Should
    Know about the Bootstrap", 2015.
    """
    if n < 2:
        return 0.025
    z, freedom = NormalDist().inv_cdf(0.975), n - 1
    terms = (  # Student's t from the normal quantile: the expansion of Cornish and Fisher
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    t = sum(term / freedom**power for power, term in enumerate(terms))
    return NormalDist().cdf(-((n / freedom) ** 0.5) * t)


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
