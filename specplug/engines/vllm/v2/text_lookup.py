"""Looks up the end of each request's own text in that text.

Every position is compared, so there is no index to maintain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Tensor = Any

LONGEST_CLASS = 8
"""Tokens. Occurrences of one length class, from a power of two to below the next, are compared with each other; the
last class has no end."""


@dataclass(frozen=True, slots=True, eq=False)
class OwnMatch:
    """The most recent of the longest earlier occurrences of the end of each text.

    length  int64[n]  tokens that match; 0 if none does
    end     int64[n]  the position after the match; any position if there is none
    same    int64[n]  occurrences of the same length class that continue with the same token
    total   int64[n]  occurrences of the same length class
    """

    length: Tensor
    end: Tensor
    same: Tensor
    total: Tensor


def own_match(rows: Tensor, lengths: Tensor, tail: Tensor) -> OwnMatch:
    """Find the end of each text in its earlier part.

    rows     int32[n, w]
    lengths  int64[n]
    tail     int64[n, m], from `DeviceTexts.tail`: the longest match is m tokens, at most 24
    """
    width = rows.shape[1]
    places = torch.arange(width, dtype=torch.int32, device=rows.device)
    # Bit j of an entry tells whether the token j places before it is the one j places before the end of the text.
    equal = torch.zeros_like(rows)
    for back in range(tail.shape[1]):
        equal[:, back:].add_(rows[:, : width - back] == tail[:, back : back + 1], alpha=1 << back)
    earlier = places < lengths[:, None] - 1
    # The lowest bits that are set without a gap.
    matching = (equal & ~(equal + 1)) * earlier
    length = _num_bits(matching)
    best = (length * width + places).amax(1).long()
    longest, end = best // width, best % width + 1
    # The length class begins with the largest power of two that the longest match reaches.
    least = 1 << (_num_bits(longest.clamp(1, LONGEST_CLASS)) - 1)
    following = rows.gather(1, end.clamp(max=width - 1)[:, None])
    among = length >= least[:, None]
    total = among.sum(1)
    same = (among[:, : width - 1] & (rows[:, 1:] == following)).sum(1)
    return OwnMatch(longest, end, same, total)


def repeated(rows: Tensor, lengths: Tensor, end: Tensor, k: int) -> Tensor:
    """int64[n, k]: the tokens from `end` on; where the text ends earlier, the part from `end` on is repeated."""
    period = (lengths - end).clamp(min=1)
    places = end[:, None] + torch.arange(k, device=rows.device) % period[:, None]
    return rows.gather(1, places.clamp(max=rows.shape[1] - 1)).long()


def _num_bits(numbers: Tensor) -> Tensor:
    """int32: the bits of numbers below 2**24; 0 has none."""
    return torch.frexp(numbers.float()).exponent
