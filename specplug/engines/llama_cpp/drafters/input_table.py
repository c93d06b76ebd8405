"""The full embedding table of a drafter whose head was trimmed.

Reads rows of weights in llama.cpp's formats, and does not depend on a context.
State: up to KEPT rows that were requested singly, since texts repeat their tokens and a row takes 0.1 ms to dequantise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize

from specplug.core import IntArray

KEPT = 4096
"""Largest number of kept rows; a row takes 2,560 bytes for a model of width 640."""


class InputTable:
    """Embeddings by token, read from a memory-mapped file on request."""

    def __init__(self, path: Path, scale: float) -> None:
        """`path` is a GGUF file whose first tensor is the table; `scale` multiplies its rows."""
        (table,) = GGUFReader(path).tensors
        self.width = int(table.shape[0])
        self._data = table.data
        self._format = table.tensor_type
        self._scale = np.float32(scale)
        self._kept: dict[int, npt.NDArray[np.float32]] = {}

    def rows(self, tokens: IntArray | Sequence[int]) -> npt.NDArray[np.float32]:
        """float32[n, width]: the embeddings of `tokens`."""
        if len(tokens) > 1:
            return self._dequantised(tokens)
        token = int(tokens[0])
        row = self._kept.get(token)
        if row is None:
            if len(self._kept) == KEPT:
                self._kept.clear()
            row = self._kept[token] = self._dequantised(tokens)
        return row

    def _dequantised(self, tokens: IntArray | Sequence[int]) -> npt.NDArray[np.float32]:
        rows: npt.NDArray[np.float32] = dequantize(self._data[np.asarray(tokens)], self._format)
        return rows if self._scale == 1.0 else rows * self._scale
