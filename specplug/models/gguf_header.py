"""The header of a GGUF file (versions 2 and 3): metadata and tensor descriptions, read with limits.

The file is untrusted input, so no length in it is trusted. Nothing here depends on an engine or on the weights.
Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path

from specplug.errors import UsageError

TYPE_SIZES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17),
}  # fmt: skip
"""By ggml type: weights per block, bytes per block. Types that are not listed are left to the engine."""

WEIGHT_TYPES = frozenset(TYPE_SIZES) - {9, 15, 24, 25, 26, 27, 28}
"""The types of weights; the others hold activations or whole numbers."""

TOKENIZER_KEYS = tuple(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "scores", "token_type", "merges"))

MAX_ENTRIES = 1 << 16
"""Metadata keys, or tensors, at most; large models have some thousands."""
MAX_ITEMS = 1 << 22
"""Items of one list at most; the largest vocabularies have some hundred thousand."""
MAX_LAYERS = 1 << 12
"""Items of a list of whole numbers that is kept: one number per layer."""

STRING, ARRAY = 8, 9
FIXED_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value by its type number; strings and lists store their own length."""

WHOLE_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
"""struct's letter of a whole number by its type number."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Header:
    """extent: bytes of the file up to the end of the last tensor. tokenizer: SHA-256 (hex) of its metadata.

    num_tokens  size of the vocabulary; 0 where the file has none
    numbers     whole numbers of the architecture by their keys without its name, such as `block_count`; lists with one
                number per layer are tuples
    matrix_types
                ggml types of the tensors with two and more dimensions
    is_causal   whether a token attends to earlier ones only, as in every model that generates text
    file_type   llama.cpp's number of the weight format as a whole; None where the file does not say
    most_used   the ggml type of most of the tensors with two and more dimensions; None where there are none
    tensors     the names of the tensors in this file
    """

    architecture: str | None
    num_layers: int
    num_tensors: int
    extent: int
    tokenizer: str
    num_tokens: int = 0
    numbers: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    matrix_types: frozenset[int] = frozenset()
    is_causal: bool = True
    file_type: int | None = None
    most_used: int | None = None
    tensors: frozenset[str] = frozenset()


def read_header(path: Path) -> Header:
    """The header of a GGUF file, some 10 ms per 100 thousand tokens. UsageError explains why it cannot be read."""
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
            if not magic:
                raise UsageError(f"{path}: an empty file; copy the model again")
            if magic[:4] != b"GGUF":
                raise UsageError(f"{path}: not a GGUF file; name one, or convert the model with llama.cpp's tools")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse_header(data)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; name an existing .gguf file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); name another file") from None
    except (struct.error, OverflowError, IndexError):
        raise UsageError(f"{path}: truncated or damaged: its header ends too early; copy it again") from None
    except _Damaged as error:
        raise UsageError(f"{path}: {error}; copy it again, or name another file") from None


PART = re.compile(r"^(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def parts_of(path: Path) -> list[Path]:
    """The files of a model, of which `path` is one, by name; some may be missing."""
    part = PART.match(path.name)
    if part is None:
        return [path]
    names = (f"{part['name']}-{number:05}-of-{part['count']}.gguf" for number in range(1, int(part["count"]) + 1))
    return [path.with_name(name) for name in names]


def require_one_file(path: Path) -> None:
    """UsageError for a part of a model in several files, for readers that take one file only."""
    parts = parts_of(path)
    if len(parts) > 1:
        raise UsageError(
            f"{path}: a model in {len(parts)} files; join them with llama.cpp's tool, then name the result: "
            "llama-gguf-split --merge FIRST_PART NEW_FILE"
        )


class _Damaged(Exception):
    """An invalid header; the message says what is wrong with it."""


def _parse_header(data: mmap.mmap) -> Header:
    version = _U32.unpack_from(data, 4)[0]
    if version not in (2, 3):
        big_endian = version in (2 << 24, 3 << 24)
        what = "big-endian files are" if big_endian else f"GGUF version {version} is"
        raise _Damaged(f"{what} not supported (versions 2 and 3 are, little-endian)")
    num_tensors, num_keys = (_count(data, at, MAX_ENTRIES) for at in (8, 16))
    values, at = _metadata(data, num_keys)
    architecture = _string(data, *values["general.architecture"]) if "general.architecture" in values else None
    alignment = _u32(data, values, "general.alignment", 32)
    if alignment == 0 or alignment & (alignment - 1):
        raise _Damaged(f"its alignment is {alignment}, which is not a power of two")
    end, at, matrices, names = _tensors(data, at, num_tensors)
    hashed = sha256()
    for key in TOKENIZER_KEYS:
        if key in values:
            value_type, start, stop = values[key]
            hashed.update(b"%s\0%d\0%d\0" % (key.encode(), value_type, stop - start))
            hashed.update(data[start:stop])
    return Header(
        architecture=architecture,
        num_layers=_u32(data, values, f"{architecture}.block_count", 0),
        num_tensors=num_tensors,
        extent=-(-at // alignment) * alignment + end if num_tensors else at,
        tokenizer=hashed.hexdigest(),
        num_tokens=_list_length(data, values, "tokenizer.ggml.tokens"),
        numbers=_whole_numbers(data, values, f"{architecture}."),
        matrix_types=frozenset(matrices),
        is_causal=_flag(data, values, f"{architecture}.attention.causal", True),
        file_type=_u32(data, values, "general.file_type", 0) if "general.file_type" in values else None,
        most_used=matrices.most_common(1)[0][0] if matrices else None,
        tensors=frozenset(names),
    )


Value = tuple[int, int, int]
"""A metadata value: its type number, and the start and end of its bytes."""


def _metadata(data: mmap.mmap, num_keys: int) -> tuple[dict[str, Value], int]:
    values: dict[str, Value] = {}
    at = 24
    for _ in range(num_keys):
        stop = _past_string(data, at)
        if stop - at > 1 << 10:
            raise _Damaged("it has a metadata key of more than 1 KiB")
        key = data[at + 8 : stop].decode("utf-8", "replace")
        value_type = _U32.unpack_from(data, stop)[0]
        at = _past_value(data, stop + 4, value_type)
        values[key] = (value_type, stop + 4, at)
    return values, at


def _past_value(data: mmap.mmap, at: int, value_type: int) -> int:
    if value_type == STRING:
        return _past_string(data, at)
    if value_type != ARRAY:
        return _inside(data, at + _fixed_size(value_type))
    item, count = _U32.unpack_from(data, at)[0], _count(data, at + 4, MAX_ITEMS)
    at += 12
    if item != STRING:
        return _inside(data, at + count * _fixed_size(item))
    read = _U64.unpack_from
    for _ in range(count):  # the hot loop: once per token and per merge
        at += 8 + read(data, at)[0]
    return _inside(data, at)


def _tensors(data: mmap.mmap, at: int, num_tensors: int) -> tuple[int, int, Counter[int], list[str]]:
    """The end of the last tensor's bytes, from the start of the tensor data; the end of the descriptions; how many
    matrices have which type; and the names."""
    end, matrices, names = 0, Counter[int](), []
    for _ in range(num_tensors):
        start, at = at, _past_string(data, at)
        names.append(data[start + 8 : at].decode("utf-8", "replace"))
        num_dims = _U32.unpack_from(data, at)[0]
        if not 1 <= num_dims <= 4:
            raise _Damaged(f"a tensor has {num_dims} dimensions")
        shape = struct.unpack_from(f"<{num_dims}Q", data, at + 4)
        tensor_type, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * num_dims)
        at += 16 + 8 * num_dims
        weights, size = TYPE_SIZES.get(tensor_type, (1, 0))
        if shape[0] % weights:
            raise _Damaged(f"a tensor has rows of {shape[0]} weights in blocks of {weights}")
        end = max(end, offset + prod(shape) // weights * size)
        if num_dims > 1:
            matrices[tensor_type] += 1
    return end, at, matrices, names


def _past_string(data: mmap.mmap, at: int) -> int:
    return _inside(data, at + 8 + int(_U64.unpack_from(data, at)[0]))


def _fixed_size(value_type: int) -> int:
    if value_type not in FIXED_SIZES:
        raise _Damaged(f"it has a metadata value of the unknown type {value_type}")
    return FIXED_SIZES[value_type]


def _inside(data: mmap.mmap, at: int) -> int:
    if at > len(data):
        raise _Damaged("truncated: its header ends too early")
    return at


def _count(data: mmap.mmap, at: int, limit: int) -> int:
    count = int(_U64.unpack_from(data, at)[0])
    if count > limit:
        raise _Damaged(f"it claims {count} entries in one list, more than {limit}")
    return count


def _string(data: mmap.mmap, value_type: int, start: int, stop: int) -> str | None:
    return data[start + 8 : stop].decode("utf-8", "replace") if value_type == STRING else None


def _flag(data: mmap.mmap, values: dict[str, Value], key: str, default: bool) -> bool:
    value_type, start, _ = values.get(key, (None, 0, 0))
    return bool(data[start]) if value_type == 7 else default


def _list_length(data: mmap.mmap, values: dict[str, Value], key: str) -> int:
    value_type, start, _ = values.get(key, (None, 0, 0))
    return int(_U64.unpack_from(data, start + 4)[0]) if value_type == ARRAY else 0


def _whole_numbers(data: mmap.mmap, values: dict[str, Value], prefix: str) -> dict[str, int | tuple[int, ...]]:
    """The whole numbers, and short lists of them, whose keys have a prefix, which is taken off."""
    found: dict[str, int | tuple[int, ...]] = {}
    for key, (value_type, start, _) in values.items():
        name = key.removeprefix(prefix)
        if name == key:
            continue
        if value_type in WHOLE_NUMBERS:
            found[name] = int(struct.unpack_from(f"<{WHOLE_NUMBERS[value_type]}", data, start)[0])
        elif value_type == ARRAY:
            item, count = _U32.unpack_from(data, start)[0], _U64.unpack_from(data, start + 4)[0]
            if item in WHOLE_NUMBERS and count <= MAX_LAYERS:
                found[name] = struct.unpack_from(f"<{count}{WHOLE_NUMBERS[item]}", data, start + 12)
    return found


def _u32(data: mmap.mmap, values: dict[str, Value], key: str, default: int) -> int:
    value_type, start, _ = values.get(key, (None, 0, 0))
    return int(_U32.unpack_from(data, start)[0]) if value_type == 4 else default
