"""Where two answers differ, and whether rounding explains it.

Knows tokens and figures. Knows no engine: each has its own rule for what rounding can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first difference of two token lists.

    position         index into the answers
    gap              plain logit of the plain token minus that of the other, after one-row passes
    shape_difference how far pass shapes alone moved these two logits apart, over the shapes it took to tell
    is_rounding      whether shape alone explains it
    """

    position: int
    plain_token: int | None
    other_token: int | None
    gap: float
    shape_difference: float
    is_rounding: bool


def first_difference(plain: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, or None; a missing token differs."""
    for position, (a, b) in enumerate(zip(plain, other, strict=False)):
        if a != b:
            return position
    return None if len(plain) == len(other) else min(len(plain), len(other))
