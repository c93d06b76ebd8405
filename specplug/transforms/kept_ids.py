"""Which rows a trimmed head keeps.

Knows weights of tokens and what tokens print. Knows neither where the weights come from nor any file.
Source: VocabTrim (arXiv 2506.22694), top-K and coverage; FR-Spec (arXiv 2502.14856) for forcing what ends an answer.
Ours also keeps every special, byte, blank and digit token, and breaks ties by id: in most vocabularies frequent tokens
come first. Where the target's probabilities are at hand, weights are what was to be expected, not what came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.errors import UsageError

Counts = npt.NDArray[np.int64]

Weights = npt.NDArray[np.int64] | npt.NDArray[np.float64]
"""[V]: how often each token came, or was to be expected."""

ROUND_TO = 32
"""Rows come in multiples of so many: of another count, kernels compute the last ones by sums that round otherwise."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is known of every token.

    pieces   what each id prints, as bytes; empty for control tokens
    special  ids of control, unknown, byte and fallback tokens
    """

    pieces: Sequence[bytes]
    special: frozenset[int]

    def always_kept(self) -> IntArray:
        """int32[n], ascending: special and byte tokens, blanks, single digits."""
        plain = {id for id, piece in enumerate(self.pieces) if _is_blank_or_digit(piece)}
        return np.array(sorted(plain | self.special), dtype=np.int32)


def by_size(weights: Weights, always: IntArray, size: int) -> IntArray:
    """int32[n], ascending: `always` and the heaviest others, `size` rows, rounded up to ROUND_TO.

    UsageError for a size below 1, above V, or below what is always kept.
    """
    num_tokens = len(weights)
    if not 1 <= size <= num_tokens:
        raise UsageError(f"size {size}: use 1 to {num_tokens}, the tokens of this vocabulary")
    if size < len(always):
        raise UsageError(f"size {size}: special, blank and digit tokens alone are {len(always)}; use at least as many")
    size = min(-(-size // ROUND_TO) * ROUND_TO, num_tokens)
    return np.sort(_ranked(weights, always)[:size]).astype(np.int32)


def by_coverage(weights: Weights, always: IntArray, share: float, counts: Counts) -> IntArray:
    """As `by_size`, with the fewest rows that hold this share of everything counted (0 < share <= 1)."""
    if not 0 < share <= 1:
        raise UsageError(f"coverage {share}: use a share above 0, up to 1")
    if not counts.any():
        raise UsageError("nothing was counted; calibrate on more text")
    ranked = _ranked(weights, always)
    held = np.cumsum(counts[ranked]) / counts.sum()
    size = max(int(np.searchsorted(held, share - 1e-12)) + 1, len(always))
    return by_size(weights, always, min(size, len(weights)))


def coverage(ids: IntArray, counts: Counts) -> float:
    """Share of what was counted that lies in `ids`; 0 where nothing was."""
    total = int(counts.sum())
    return float(counts[ids].sum()) / total if total else 0.0


def _ranked(weights: Weights, always: IntArray) -> IntArray:
    """All ids: `always` first, then by falling weight, equal ones by id."""
    order = np.argsort(-weights, kind="stable")
    forced = np.zeros(len(weights), dtype=bool)
    forced[always] = True
    return np.concatenate((always, order[~forced[order]])).astype(np.int32)


def _is_blank_or_digit(piece: bytes) -> bool:
    stripped = piece.strip()
    return bool(piece) and (not stripped or (len(stripped) == 1 and stripped.isdigit()))
