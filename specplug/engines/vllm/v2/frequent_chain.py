"""Chooses, among continuations of a text, the token that most of them have next, again and again.

All depths are counted at once: continuations are sorted, so those that begin alike are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Tensor = Any


@dataclass(frozen=True, slots=True, eq=False)
class FrequentChain:
    """One chain per text.

    tokens  int64[n, k]  the chosen tokens
    weight  int64[n, k]  of the continuations that have the chain up to a token; 0 from its end on
    total   int64[n, k]  of the continuations that have the chain before a token, and any token there
    """

    tokens: Tensor
    weight: Tensor
    total: Tensor


def frequent_chain(rows: Tensor, weights: Tensor, border: int) -> FrequentChain:
    """The heaviest token at each depth, of several the smallest one.

    rows     int32[n, r, k]  continuations, in ascending order, with `border` after their ends
    weights  int64[n, r]     0 for rows that do not count
    border   larger than all tokens
    """
    # A group is the neighbours that are alike up to a depth. Each row is compared with the one before it.
    before = torch.cat((rows[:, :1], rows[:, :-1]), 1)
    groups = ((rows != before).cumsum(2) > 0).cumsum(1)
    counted = (rows < border) * weights[:, :, None]
    sums = torch.zeros_like(counted).scatter_add_(1, groups, counted).gather(1, groups)
    # One number per row and depth whose order is that of weights, and for equal ones that of smaller tokens.
    bits = border.bit_length()
    ranks = (sums << bits) - rows
    chosen = ranks[:, :, 0]
    best = [chosen.amax(1)]
    for depth in range(1, rows.shape[2]):
        others = chosen != best[-1][:, None]
        chosen = ranks[:, :, depth].masked_fill(others, -border - 1)
        best.append(chosen.amax(1))
    rank = torch.stack(best, 1)
    weight = (rank + border) >> bits
    tokens = (weight << bits) - rank
    # 1 where a row has the chain up to the depth before.
    alike = (rows[:, :, :-1] == tokens[:, None, :-1]).cumprod(2)
    total = torch.cat((counted[:, :, :1], counted[:, :, 1:] * alike), 2).sum(1)
    return FrequentChain(tokens, weight, total)


def sorted_rows(rows: Tensor, weights: Tensor, border: int) -> tuple[Tensor, Tensor]:
    """Rows in ascending order, with their weights. As many tokens as fit into 63 bits are compared at a time."""
    bits = border.bit_length()
    width = 63 // bits
    for first in reversed(range(0, rows.shape[2], width)):
        part = rows[:, :, first : first + width]
        shifts = bits * torch.arange(part.shape[2] - 1, -1, -1, device=rows.device)
        order = (part.long() << shifts).sum(2).argsort(dim=1, stable=True)
        rows, weights = rows.gather(1, order[:, :, None].expand_as(rows)), weights.gather(1, order)
    return rows, weights
