"""The whole embedding table of a drafter whose head was trimmed.

Knows rows of weights in llama.cpp's formats. Knows no context.
Keeps: rows that were asked for alone, up to KEPT, since texts repeat their tokens and a row takes 0.1 ms to unpack.
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
"""Rows; of 2,560 bytes each for a model 640 wide."""


class InputTable:
    """Embeddings by token, read from a mapped file as they are asked for."""

    def __init__(self, path: Path, scale: float) -> None:
        """`path` is a GGUF file whose first tensor is the table; `scale` multiplies its rows."""
        (table,) = GGUFReader(path).tensors
        self.width = int(table.shape[0])
        self._data = table.data
        self._format = table.tensor_type
        self._scale = np.float32(scale)
        self._kept: dict[int, npt.NDArray[np.float32]] = {}

    def rows(self, tokens: IntArray | Sequence[int]) -> npt.NDArray[np.float32]:
        """float32[n, width]"""
        if len(tokens) > 1:
            return self._unpacked(tokens)
        token = int(tokens[0])
        found = self._kept.get(token)
        if found is None:
            if len(self._kept) == KEPT:
                self._kept.clear()
            found = self._kept[token] = self._unpacked(tokens)
        return found

    def _unpacked(self, tokens: IntArray | Sequence[int]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = dequantize(self._data[np.asarray(tokens)], self._format)
        return found if self._scale == 1.0 else found * self._scale
