"""Reads and writes safetensors files as bytes, without interpreting weights.

Rows are copied unchanged, so that every weight format is supported, and in pieces, so that a model larger than memory
can be written. Headers are checked as untrusted input. Source of the format: github.com/huggingface/safetensors; that
library keeps everything it writes in memory, and NumPy has no bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.errors import UsageError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""File names in a checkpoint: all weights, or an index that maps each tensor to one of several files."""

HEADER_LIMIT = 100 << 20
"""Bytes of a file's header and of an index at most; the limit that the format itself has."""

PIECE = 16 << 20
"""Bytes that are copied at a time."""

ARRAYS: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "BOOL": np.dtype("?")}
"""The NumPy types of tensors that contain no weights, by the format's names."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file: `num_bytes` bytes from offset `start`, row by row."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // self.shape[0]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write into a new file; `content` yields its bytes and is called when they are written."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    content: Callable[[], Iterable[bytes]]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name. UsageError where a file is missing or damaged."""
    if (folder / WEIGHTS).is_file():
        return _tensors_in(folder / WEIGHTS)
    index = folder / INDEX
    if not index.is_file():
        raise UsageError(f"{folder}: holds no {WEIGHTS}; name a checkpoint in that format, or convert it")
    file_of = _object(_read(index, HEADER_LIMIT), index).get("weight_map")
    if not isinstance(file_of, dict):
        raise UsageError(f"{index}: damaged, it has no weight_map; download it again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(map(str, file_of.values()))):
        if Path(name).name != name:
            raise UsageError(f"{index}: {name!r} is not the name of a file beside it; download it again")
        tensors |= _tensors_in(folder / name)
    lost = sorted(file_of.keys() - tensors.keys())
    if lost:
        raise UsageError(f"{folder}: {lost[0]} is not in the file that {INDEX} names; download it again")
    return {name: tensors[name] for name in file_of}


def copied(tensor: Tensor) -> Entry:
    """A tensor, unchanged."""
    return Entry(tensor.dtype, tensor.shape, tensor.num_bytes, lambda: _pieces(tensor))


def rows(tensor: Tensor, ids: IntArray) -> Entry:
    """The rows `ids` of a tensor, in this order."""
    return Entry(tensor.dtype, (len(ids), *tensor.shape[1:]), len(ids) * tensor.row_bytes, lambda: _rows(tensor, ids))


def array(values: npt.NDArray[Any]) -> Entry:
    """An array of integers or booleans, of a type in ARRAYS."""
    dtype = next(name for name, dtype in ARRAYS.items() if dtype == values.dtype)
    return Entry(dtype, values.shape, values.nbytes, lambda: [values.tobytes()])


def read_array(tensor: Tensor, name: str) -> npt.NDArray[Any]:
    """The values of a tensor of integers or booleans. UsageError for any other type."""
    dtype = ARRAYS.get(tensor.dtype)
    if dtype is None or tensor.num_bytes != prod(tensor.shape) * dtype.itemsize:
        raise UsageError(f"{tensor.path}: {name} has type {tensor.dtype} instead of integers; download it again")
    return np.frombuffer(b"".join(_pieces(tensor)), dtype).reshape(tensor.shape)


def write(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write a new file. The widest types come first, so that every tensor is aligned when the file is memory-mapped."""
    ordered = sorted(entries.items(), key=lambda item: -item[1].num_bytes // max(1, prod(item[1].shape)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, entry in ordered:
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + entry.num_bytes]}
        at += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, entry in ordered:
            for piece in entry.content():
                file.write(piece)
    assert path.stat().st_size == 8 + len(text) + at


def _pieces(tensor: Tensor) -> Iterator[bytes]:
    with open(tensor.path, "rb") as file:
        file.seek(tensor.start)
        left = tensor.num_bytes
        while left:
            piece = file.read(min(left, PIECE))
            if not piece:
                raise UsageError(f"{tensor.path}: truncated; download it again")
            left -= len(piece)
            yield piece


def _rows(tensor: Tensor, ids: IntArray) -> Iterator[bytes]:
    shape = (tensor.shape[0], tensor.row_bytes)
    mapped = np.memmap(tensor.path, np.uint8, "r", offset=tensor.start, shape=shape)
    at_once = max(1, PIECE // tensor.row_bytes)
    for first in range(0, len(ids), at_once):
        yield mapped[ids[first : first + at_once]].tobytes()


def _tensors_in(path: Path) -> dict[str, Tensor]:
    content = _read(path, 8)
    length = int.from_bytes(content, "little")
    if len(content) < 8 or length > HEADER_LIMIT:
        raise UsageError(f"{path}: damaged, its header cannot be read; download it again")
    header = _object(_read(path, length, start=8), path)
    size = path.stat().st_size
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor = _tensor(entry, path, 8 + length)
        if tensor is None or tensor.start + tensor.num_bytes > size:
            raise UsageError(f"{path}: damaged or truncated at {name[:80]}; download it again")
        tensors[name] = tensor
    return tensors


def _tensor(entry: Any, path: Path, first: int) -> Tensor | None:
    """The tensor that a header's entry describes; None where the entry is invalid."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return None
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        return None
    num_bytes = offsets[1] - offsets[0]
    if shape and shape[0] and num_bytes % shape[0]:
        return None
    return Tensor(entry["dtype"], tuple(shape), path, first + offsets[0], num_bytes)


def _sizes(values: Any) -> list[int] | None:
    return values if isinstance(values, list) and all(type(value) is int and value >= 0 for value in values) else None


def _read(path: Path, length: int, start: int = 0) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); download it again") from None


def _object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: damaged, it lacks the expected JSON object; download it again")
    return value
