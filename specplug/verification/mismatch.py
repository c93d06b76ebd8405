"""Finds where two answers differ first, and records whether rounding explains it.

Which differences rounding can explain is decided by each engine; this module does not depend on any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first difference of two token lists.

    position         index into the answers
    gap              logit of the plain answer's token minus that of the other answer's token, at this position
    shape_difference largest change of this gap by the shape of passes alone, over the shapes that were tried
    is_rounding      whether the shape of passes alone explains the difference
    """

    position: int
    plain_token: int | None
    other_token: int | None
    gap: float
    shape_difference: float
    is_rounding: bool


def first_difference(plain: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, or None. A missing token counts as different."""
    for position, (a, b) in enumerate(zip(plain, other, strict=False)):
        if a != b:
            return position
    return None if len(plain) == len(other) else min(len(plain), len(other))
