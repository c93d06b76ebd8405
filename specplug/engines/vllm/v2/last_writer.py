"""Writes rows into a table so that of several rows with the same index the last one counts.

On a GPU the order of equal indices in a scatter is undefined. Here every row first leaves its number at its index,
where the largest one stays, and only the row that finds its own number there is written.
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = Any


class LastWriter:
    """Finds the last row per index. State: int64[size + 1]; the place after the end takes the rows that do not
    count."""

    def __init__(self, size: int, device: Any) -> None:
        self._elsewhere = torch.tensor(size, device=device)
        self._stamps = torch.zeros(size + 1, dtype=torch.int64, device=device)
        self._written = torch.ones((), dtype=torch.int64, device=device)

    def targets(self, index: Tensor, valid: Tensor) -> Tensor:
        """int64[r]: for each row the index to write to, or `size` for a row that does not count.

        index  int64[r], in [0, size)
        valid  bool[r]; other rows never count
        """
        numbers = self._written + torch.arange(index.shape[0], device=index.device)
        self._written.add_(index.shape[0])
        self._stamps.scatter_reduce_(0, torch.where(valid, index, self._elsewhere), numbers, "amax")
        return torch.where(valid & (self._stamps[index] == numbers), index, self._elsewhere)
