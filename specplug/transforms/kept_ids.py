"""Chooses the rows that a trimmed head keeps, from a weight per token.

Source: VocabTrim (arXiv 2506.22694) for top-K and coverage; FR-Spec (arXiv 2502.14856) for always keeping tokens that
end an answer. Unlike there, every special, byte, whitespace and single-digit token is kept, and ties are broken by id,
because most vocabularies list frequent tokens first. Where the target's probabilities are available, weights are
expected counts instead of counts. The module does not depend on files or on where the weights come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.errors import UsageError

Counts = npt.NDArray[np.int64]
"""int64[V]: how often each token occurred."""

Weights = npt.NDArray[np.int64] | npt.NDArray[np.float64]
"""[V]: the count or the expected count of each token."""

ROUND_TO = 32
"""The number of rows is a multiple of this. With other numbers, kernels sum the last rows in another order, which
rounds differently."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The text and the kind of every token.

    pieces   the bytes that each id prints; empty for control tokens
    special  ids of control, unknown, byte and fallback tokens
    """

    pieces: Sequence[bytes]
    special: frozenset[int]

    def always_kept(self) -> IntArray:
        """int32[n], ascending: special and byte tokens, whitespace, single digits."""
        plain = {id for id, piece in enumerate(self.pieces) if _is_blank_or_digit(piece)}
        return np.array(sorted(plain | self.special), dtype=np.int32)


def by_size(weights: Weights, always: IntArray, size: int) -> IntArray:
    """int32[n], ascending: `always` and the ids with the largest weights, `size` in all, rounded up to ROUND_TO.

    UsageError for a size below 1, above V, or below what is always kept.
    """
    num_tokens = len(weights)
    if not 1 <= size <= num_tokens:
        raise UsageError(f"size {size}: use 1 to {num_tokens}, the tokens of this vocabulary")
    if size < len(always):
        raise UsageError(
            f"size {size}: special, blank and digit tokens alone are {len(always)}; use at least that many"
        )
    size = min(-(-size // ROUND_TO) * ROUND_TO, num_tokens)
    return np.sort(_ranked(weights, always)[:size]).astype(np.int32)


def by_coverage(weights: Weights, always: IntArray, share: float, counts: Counts) -> IntArray:
    """As `by_size`, with the fewest rows that contain this share of all counted tokens (0 < share <= 1)."""
    if not 0 < share <= 1:
        raise UsageError(f"coverage {share}: use a share above 0, up to 1")
    if not counts.any():
        raise UsageError("nothing was counted; calibrate on more text")
    ranked = _ranked(weights, always)
    held = np.cumsum(counts[ranked]) / counts.sum()
    size = max(int(np.searchsorted(held, share - 1e-12)) + 1, len(always))
    return by_size(weights, always, min(size, len(weights)))


def coverage(ids: IntArray, counts: Counts) -> float:
    """The share of the counted tokens that are among `ids`; 0 where nothing was counted."""
    total = int(counts.sum())
    return float(counts[ids].sum()) / total if total else 0.0


def _ranked(weights: Weights, always: IntArray) -> IntArray:
    """All ids: `always` first, then by descending weight, and by id where weights are equal."""
    order = np.argsort(-weights, kind="stable")
    forced = np.zeros(len(weights), dtype=bool)
    forced[always] = True
    return np.concatenate((always, order[~forced[order]])).astype(np.int32)


def _is_blank_or_digit(piece: bytes) -> bool:
    stripped = piece.strip()
    return bool(piece) and (not stripped or (len(stripped) == 1 and stripped.isdigit()))
