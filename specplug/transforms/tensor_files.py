"""Safetensors files as bytes: where each tensor lies, and a new file written piece by piece.

Knows the format's head, which it reads as a stranger's input. Knows no weights: rows are copied as they lie, so every
format of weights is, and a model larger than memory can be written.
Source: github.com/huggingface/safetensors. Its library holds in memory what it writes, and NumPy knows no bfloat16.
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
"""Names in a checkpoint: all weights, or which of several files each tensor is in."""

HEAD_LIMIT = 100 << 20
"""Bytes of a file's head, and of an index; the format's own limit."""

PIECE = 16 << 20
"""Bytes in memory at a time."""

ARRAYS: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "BOOL": np.dtype("?")}
"""Of tensors that hold no weights: what they are in NumPy."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One of a file's: `num_bytes` from `start` on, row by row."""

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
    """What goes into a new file under one name; `content` is asked for when its turn comes."""

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
    place_of = _object(_read(index, HEAD_LIMIT), index).get("weight_map")
    if not isinstance(place_of, dict):
        raise UsageError(f"{index}: damaged, it has no weight_map; fetch it again")
    found: dict[str, Tensor] = {}
    for name in sorted(set(map(str, place_of.values()))):
        if Path(name).name != name:
            raise UsageError(f"{index}: {name!r} is no name of a file beside it; fetch it again")
        found |= _tensors_in(folder / name)
    lost = sorted(place_of.keys() - found.keys())
    if lost:
        raise UsageError(f"{folder}: {lost[0]} is not in the file that {INDEX} names; fetch it again")
    return {name: found[name] for name in place_of}


def whole(tensor: Tensor) -> Entry:
    """A tensor as it is."""
    return Entry(tensor.dtype, tensor.shape, tensor.num_bytes, lambda: _pieces(tensor))


def rows(tensor: Tensor, ids: IntArray) -> Entry:
    """Some rows of a tensor, in this order."""
    return Entry(tensor.dtype, (len(ids), *tensor.shape[1:]), len(ids) * tensor.row_bytes, lambda: _rows(tensor, ids))


def array(values: npt.NDArray[Any]) -> Entry:
    """Whole numbers, or true and false."""
    dtype = next(name for name, dtype in ARRAYS.items() if dtype == values.dtype)
    return Entry(dtype, values.shape, values.nbytes, lambda: [values.tobytes()])


def read_array(tensor: Tensor, name: str) -> npt.NDArray[Any]:
    """A tensor of whole numbers, or of true and false. UsageError for any other."""
    dtype = ARRAYS.get(tensor.dtype)
    if dtype is None or tensor.num_bytes != prod(tensor.shape) * dtype.itemsize:
        raise UsageError(f"{tensor.path}: {name} is of {tensor.dtype}, not of whole numbers; fetch it again")
    return np.frombuffer(b"".join(_pieces(tensor)), dtype).reshape(tensor.shape)


def write(path: Path, entries: Mapping[str, Entry]) -> None:
    """A new file. Wide numbers come first, so that each tensor is aligned for who maps the file."""
    ordered = sorted(entries.items(), key=lambda item: -item[1].num_bytes // max(1, prod(item[1].shape)))
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, entry in ordered:
        head[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + entry.num_bytes]}
        at += entry.num_bytes
    text = json.dumps(head, separators=(",", ":")).encode()
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
                raise UsageError(f"{tensor.path}: truncated; fetch it again")
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
    if len(content) < 8 or length > HEAD_LIMIT:
        raise UsageError(f"{path}: damaged, its head cannot be read; fetch it again")
    head = _object(_read(path, length, start=8), path)
    size = path.stat().st_size
    tensors = {}
    for name, entry in head.items():
        if name == "__metadata__":
            continue
        tensor = _tensor(entry, path, 8 + length)
        if tensor is None or tensor.start + tensor.num_bytes > size:
            raise UsageError(f"{path}: damaged or truncated at {name[:80]}; fetch it again")
        tensors[name] = tensor
    return tensors


def _tensor(entry: Any, path: Path, first: int) -> Tensor | None:
    """None where the entry is not as it must be."""
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
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); fetch it again") from None


def _object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: damaged, no JSON object where it must be; fetch it again")
    return found
