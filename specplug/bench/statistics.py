"""Confidence intervals of measured figures: tokens and seconds per prompt, or milliseconds per pass.

The module does not depend on an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from statistics import NormalDist

import numpy as np

from specplug.core import FloatArray

RESAMPLES = 2000
"""Bootstrap samples per interval."""

FEWEST_OF_KIND = 3
"""Fewer prompts of one kind say too little about how much that kind varies."""


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
    kinds: Sequence[str] = (),
) -> Interval:
    """Tokens per second over the base's, with a bootstrap interval over prompts; item i of all lists is one prompt.

    The ratio of a resample is the ratio of its totals, so that a long answer counts by its cost. A prompt where either
    answer has no tokens is left out. Deterministic. ValueError when no prompt remains.

    groups    a number for each prompt; those with the same one were answered at once and share their time, so that they
              count as one prompt. All are on their own where it is empty
    expanded  whether the interval is the expanded percentile interval, see `expanded_tail`
    kinds     of work, by prompt; not together with groups. How many prompts there are of each kind does not vary, so
              the interval is then that of a stratified sample, without a bootstrap. Empty for none
    """
    if len(groups) and len(kinds):
        raise ValueError("prompts that were answered at once have no kind of their own")
    if len(groups):
        index = np.unique(groups, return_inverse=True)[1]
        tokens, seconds, base_tokens, base_seconds = (
            np.bincount(index, weights=values).tolist() for values in (tokens, seconds, base_tokens, base_seconds)
        )
    usable = [i for i, pair in enumerate(zip(tokens, base_tokens, strict=True)) if min(pair) > 0]
    if not usable:
        raise ValueError("no answer has tokens")
    columns = np.array([tokens, seconds, base_tokens, base_seconds], dtype=np.float64)[:, usable]
    strata = _strata([kinds[i] for i in usable]) if len(kinds) else []
    if len(strata) > 1:
        return _stratified(columns, strata)
    picks = np.random.default_rng(0).integers(0, len(usable), (RESAMPLES, len(usable)))
    totals = columns[:, picks].sum(axis=2)
    tail = expanded_tail(len(usable)) if expanded else 0.025
    ratios = totals[0] / totals[1] / (totals[2] / totals[3])
    low, median, high = np.percentile(ratios, [100 * tail, 50.0, 100 - 100 * tail])
    return Interval(float(median), float(low), float(high))


def _strata(kinds: Sequence[str]) -> list[list[int]]:
    """Indices of the prompts of each kind with FEWEST_OF_KIND or more, and those of all others together.

    Where these are too few as well, they are added to the smallest stratum.
    """
    by_kind: dict[str, list[int]] = {}
    for index, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(index)
    strata = [members for members in by_kind.values() if len(members) >= FEWEST_OF_KIND]
    rest = [index for members in by_kind.values() if len(members) < FEWEST_OF_KIND for index in members]
    if len(rest) >= FEWEST_OF_KIND or not strata:
        return [*strata, rest] if rest else strata
    min(strata, key=len).extend(rest)
    return strata


def _stratified(columns: FloatArray, strata: Sequence[Sequence[int]]) -> Interval:
    """The ratio of totals with the interval of a stratified sample, by linearisation of its logarithm.

    columns  (4, prompts): tokens, seconds, and those of the base
    Source: Satterthwaite, "An Approximate Distribution of Estimates of Variance Components", 1946. His degrees of
    freedom are too many where the variances come from three or four prompts each. So the geometric mean of his and
    those of the smallest stratum is taken: docs/lab-book/tuning.md#intervals-within-kinds-of-work.
    """
    totals = columns.sum(axis=1)
    ratio = float(totals[0] / totals[1] / (totals[2] / totals[3]))
    shares = columns / totals[:, None]
    deviations = shares[0] - shares[1] - shares[2] + shares[3]
    variances = [len(members) * float(np.var(deviations[members], ddof=1)) for members in strata]
    total = sum(variances)
    if not total:
        return Interval(ratio, ratio, ratio)
    freedom = total**2 / sum(one**2 / (len(members) - 1) for one, members in zip(variances, strata, strict=True))
    fewest = min(map(len, strata)) - 1
    half = _student_quantile((freedom * fewest) ** 0.5) * total**0.5
    return Interval(ratio, ratio * exp(-half), ratio * exp(half))


def expanded_tail(n: int) -> float:
    """The share of resamples on each side of a 95% interval from n values; 0.025 for one value, and for very many.

    Percentile intervals of few values are too narrow: a bootstrap divides the variance by n in place of n - 1, and has
    a normal tail in place of Student's t. Source: the expanded percentile interval of Hesterberg, "What Teachers Should
    Know about the Bootstrap", 2015.
    """
    if n < 2:
        return 0.025
    return NormalDist().cdf(-((n / (n - 1)) ** 0.5) * _student_quantile(n - 1))


def _student_quantile(freedom: float) -> float:
    """The 97.5% quantile of Student's t, by the expansion of Cornish and Fisher from the normal one."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def median_interval(values: Sequence[float]) -> Interval:
    """The median of one quantity with its 95% interval from order statistics; fewer than six values give their range.

    The number of values below the true median is binomial(n, 1/2); its normal approximation yields the two ranks.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    half = 0.98 * n**0.5
    low, high = max(0, int(np.floor(n / 2 - half))), min(n - 1, int(np.ceil(n / 2 + half)))
    return Interval(float(np.median(ordered)), float(ordered[low]), float(ordered[high]))
