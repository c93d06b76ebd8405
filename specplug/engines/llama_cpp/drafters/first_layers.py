"""Cuts the cached keys and values of a sequence to those of the first layers.

A drafter that has the first layers of the target computes the same keys and values, so it can load them instead of
reading the text. Works on the bytes that llama.cpp saves, and does not depend on a context.
Source: `llama_kv_cache::state_write` (github.com/ggml-org/llama.cpp, src/llama-kv-cache.cpp). A model with a window of
attention in some layers has two caches, one after the other.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from specplug.errors import SpecplugError

HEADER = 8
"""Bytes before the first cache: a mark and the sequence id."""

NUM_LAYERS = struct.Struct("<II")
"""Whether values are transposed, and the number of layers."""


def layers_per_cache(state: bytes) -> tuple[int, ...]:
    """The number of layers in each cache of a state. SpecplugError for bytes that are no such state."""
    return tuple(len(cache.keys) for cache in _caches(state))


def cut(state: bytes, layers: Sequence[int]) -> bytes:
    """The state with the first layers alone, so many for each cache. SpecplugError for bytes that are no such state."""
    caches = _caches(state)
    saved = [len(cache.keys) for cache in caches]
    if len(saved) != len(layers) or any(count > every for count, every in zip(layers, saved, strict=True)):
        raise SpecplugError(f"llama.cpp saved the cells of {saved} layers; {list(layers)} are needed")
    parts = [state[:HEADER]]
    for count, cache in zip(layers, caches, strict=True):
        parts.append(state[cache.cells])
        if cache.transposed is not None:
            parts.append(NUM_LAYERS.pack(cache.transposed, count))
        parts += [state[one] for one in (*cache.keys[:count], *cache.values[:count])]
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class _Cache:
    """Where the list of cells is, and the keys and the values of each layer; `transposed` is None without cells."""

    cells: slice
    transposed: int | None
    keys: list[slice]
    values: list[slice]


def _caches(state: bytes) -> list[_Cache]:
    found = []
    reader = _Reader(state, HEADER)
    try:
        while reader.at < len(state):
            begin = reader.at
            streams, cells = reader.numbers("II")
            if streams != 1:
                raise SpecplugError(f"llama.cpp saved {streams} parts of a cache, where one was expected")
            for _ in range(cells):
                _, ids = reader.numbers("iI")
                reader.skip(4 * ids)
            listed = slice(begin, reader.at)
            if not cells:
                found.append(_Cache(listed, None, [], []))
                continue
            transposed, layers = reader.numbers("II")
            keys = [reader.rows(cells) for _ in range(layers)]
            values = [reader.columns(cells) if transposed else reader.rows(cells) for _ in range(layers)]
            found.append(_Cache(listed, transposed, keys, values))
    except struct.error:
        raise SpecplugError("llama.cpp saves the cells of a sequence in a form that is not known here") from None
    return found


class _Reader:
    """Reads numbers from bytes, and raises struct.error at their end."""

    def __init__(self, data: bytes, at: int) -> None:
        self.at = at
        self._data = data

    def numbers(self, kinds: str) -> tuple[int, ...]:
        found = struct.unpack_from("<" + kinds, self._data, self.at)
        self.at += struct.calcsize("<" + kinds)
        return found

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self._data):
            raise struct.error

    def rows(self, cells: int) -> slice:
        """One row for each cell, after the type and the size of a row."""
        begin = self.at
        _, size = self.numbers("iQ")
        self.skip(size * cells)
        return slice(begin, self.at)

    def columns(self, cells: int) -> slice:
        """One column for each number of a row, after the type, the size of a number and their count."""
        begin = self.at
        _, size, count = self.numbers("iII")
        self.skip(size * count * cells)
        return slice(begin, self.at)
