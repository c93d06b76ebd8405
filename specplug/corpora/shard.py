"""One shard of a corpus: tokens and their suffix order, mapped from files, and the search for a phrase in them.

Tokens are stored with the highest byte first, so that the order of their bytes is the order of ids and a comparison is
one of `bytes`. The files are only read, and what is not searched is not loaded.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left, bisect_right
from contextlib import suppress
from dataclasses import dataclass
from errno import ENOENT
from itertools import count
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray

TOKENS, ORDER, STARTS = "tokens", "order", "starts"
"""Endings of the files of a shard.

tokens  u16 or u32, highest byte first: the documents, each followed by the separator
order   u32, lowest byte first: where the suffixes start, in ascending order
starts  u32, lowest byte first: for every id, and for the separator, how many suffixes begin with a smaller one; and the
        number of all
"""

LOADED_AT_ONCE = 64 << 20
"""Bytes of a shard's files up to which they are read when it is opened."""

_loading: dict[Path, Event] = {}
"""What is set when the files of a large shard were read, which one thread does for all that open them."""

_loading_lock = Lock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_loading.clear)  # the threads that would set them are not in the child

Interval = tuple[int, int]
"""The first suffix in the order that starts with a phrase, and the first one after it that does not."""


@dataclass(frozen=True, slots=True)
class Widths:
    """How the ids of a vocabulary are stored.

    dtype      of NumPy
    num_bytes  per token
    separator  the id between two documents, which is no token
    """

    dtype: str
    num_bytes: int
    separator: int


def widths(num_tokens: int) -> Widths:
    """For a vocabulary of `num_tokens`."""
    return Widths(">u2", 2, (1 << 16) - 1) if num_tokens < 1 << 16 else Widths(">u4", 4, (1 << 32) - 1)


def encoded(tokens: npt.ArrayLike, how: Widths) -> bytes:
    return np.asarray(tokens).astype(how.dtype).tobytes()


class Shard:
    """A shard that is open for searching. Its maps are closed when nothing refers to it."""

    _numbers = count()

    def __init__(self, stem: Path, num_tokens: int) -> None:
        """`num_tokens` is the size of the vocabulary. OSError or ValueError for files that do not fit one another."""
        self.number = next(self._numbers)
        """Of no other shard of this process."""
        self.stem = stem
        self.how = widths(num_tokens)
        self.num_tokens = num_tokens
        self._bytes, self._order_bytes = _mapped(stem.with_suffix(f".{TOKENS}")), _mapped(stem.with_suffix(f".{ORDER}"))
        self.tokens: npt.NDArray[Any] = np.frombuffer(self._bytes, dtype=self.how.dtype)
        self.order: npt.NDArray[np.uint32] = np.frombuffer(self._order_bytes, dtype="<u4")
        self._order = memoryview(self._order_bytes).cast("I")
        starts = np.frombuffer(_mapped(stem.with_suffix(f".{STARTS}")), dtype="<u4")
        sizes = len(starts) == num_tokens + 2 and len(self.tokens) == len(self.order) == starts[-1]
        if not sizes or starts[0] or (starts[1:] < starts[:-1]).any():
            raise ValueError(f"{len(self.tokens)} tokens, {len(self.order)} suffixes and their starts do not fit")
        self._starts = memoryview(starts.tobytes()).cast("I")
        self.loaded = Event()
        """Set when the files were read, so that a search need not wait for a disk."""

    def __len__(self) -> int:
        return len(self.tokens)

    def find(self, phrase: bytes, first: int) -> Interval:
        """The suffixes that start with a phrase; an empty interval if none does.

        phrase  at least one token, encoded
        first   the id of its first token
        """
        low, high = self._starts[first], self._starts[first + 1]
        data, width, size = self._bytes, self.how.num_bytes, len(phrase)

        def beginning(place: int) -> bytes:
            return data[place * width : place * width + size]

        low = bisect_left(self._order, phrase, low, high, key=beginning)
        if low == high or beginning(self._order[low]) != phrase:
            return low, low
        return low, bisect_right(self._order, phrase, low, high, key=beginning)

    def narrowed(self, interval: Interval, length: int, token: bytes) -> Interval:
        """Of suffixes that start with the same `length` tokens, those that have `token` (encoded) next."""
        data, width = self._bytes, self.how.num_bytes

        def following(place: int) -> bytes:
            at = (place + length) * width
            return data[at : at + width]

        low, high = interval
        low = bisect_left(self._order, token, low, high, key=following)
        if low == high or following(self._order[low]) != token:
            return low, low
        return low, bisect_right(self._order, token, low, high, key=following)

    def following(self, interval: Interval, length: int, most: int, depth: int) -> IntArray:
        """int32[m, depth], m <= most: what follows the first `length` tokens of the suffixes of an interval; -1 from
        the end of a document on, and from an id that is no token.

        Of more than `most` suffixes an evenly spaced sample is taken. They are sorted by what follows, so the sample
        has the shares of the complete interval, and its rows are sorted.
        """
        low, high = interval
        if high - low <= most:
            places = self.order[low:high].astype(np.int64)
        else:
            places = self.order[low + (2 * np.arange(most) + 1) * (high - low) // (2 * most)].astype(np.int64)
        at = np.minimum(places[:, None] + (length + np.arange(depth)), len(self.tokens) - 1)
        rows = self.tokens[at].astype(np.int64)
        rows[np.logical_or.accumulate(rows >= self.num_tokens, axis=1)] = -1
        found: IntArray = rows.astype(np.int32)
        return found

    def load(self) -> None:
        """Read the files into the system's memory: small ones now, large ones in a thread."""
        if len(self._bytes) + len(self._order_bytes) <= LOADED_AT_ONCE:
            self._read()
            self.loaded.set()
            return
        with _loading_lock:
            known = _loading.get(self.stem)
            if known is None:
                _loading[self.stem] = self.loaded
                Thread(target=self._read, args=(self.loaded,), daemon=True).start()
            else:
                self.loaded = known

    def _read(self, done: Event | None = None) -> None:
        try:
            buffer = bytearray(1 << 20)
            for ending in (ORDER, TOKENS):
                # A corpus that was removed meanwhile is searched all the same: it is mapped.
                with suppress(OSError), open(self.stem.with_suffix(f".{ending}"), "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
        finally:
            if done is not None:
                done.set()


def starts_of(tokens: npt.NDArray[Any], num_tokens: int) -> npt.NDArray[np.uint32]:
    """uint32[num_tokens + 2]: the contents of the file `starts`."""
    counts = np.bincount(tokens[tokens < num_tokens].astype(np.int64), minlength=num_tokens)
    return np.concatenate(([0], np.cumsum(counts), [len(tokens)])).astype("<u4")


def _mapped(path: Path) -> mmap.mmap:
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(ENOENT, "No such file")
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
