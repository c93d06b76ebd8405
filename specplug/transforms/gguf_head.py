"""Trims the head of a GGUF model to chosen rows. The result is a drafter that stock llama.cpp loads.

Source: VocabTrim (arXiv 2506.22694). In every weight format a block is part of one row, so rows are copied unchanged.
The input keeps the full vocabulary: the embedding table is in a separate file, and its rows are the input of a pass, as
embeddings. In some architectures llama.cpp scales the embeddings of tokens but not those that a caller provides; the
manifest records the factor. The module does not depend on how the rows were chosen or on how the drafter is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.machine import fingerprint
from specplug.models import drafter_folders
from specplug.models.drafter_folders import Manifest
from specplug.models.gguf_header import require_one_file
from specplug.models.references import check_gguf, tokenizer_hash
from specplug.transforms.dequantise import END_TOKENS
from specplug.transforms.head_shape import HeadShape
from specplug.transforms.kept_ids import Vocabulary
from specplug.transforms.requantise import BITS, requantise

MODEL = "model.gguf"
EMBEDDINGS = "embeddings.gguf"
"""File names in the folder: the drafter, and the full embedding table for its input."""

TABLE, HEAD = "token_embd.weight", "output.weight"
"""Tensor names. In a model without the second, the embedding table is the head (tied embeddings)."""

SCALED = ("gemma", "gemma2", "gemma3")
"""Architectures in which llama.cpp multiplies the embedding of a token, but no other input, by sqrt(width)."""

UNSCALED = ("llama", "qwen2", "qwen3", "smollm3", "olmo2", "phi3")
"""Architectures in which embeddings are not scaled."""

EIGHT_BITS = "q8_0"
LARGE_FORMATS = (EIGHT_BITS, "f16", "bf16", "f32")
"""A drafter in a smaller format gets a head in the eight-bit one: four bits would save little in a trimmed head, and
cost much acceptance (docs/lab-book/trimmed-heads.md)."""

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
"""Token types of GGUF; 4 is a user-defined token, which is text."""


def vocabulary(path: Path) -> Vocabulary:
    """The text and the kind of every token of a GGUF model."""
    reader = _open(path)
    texts = _strings(reader, "tokenizer.ggml.tokens")
    types = _value(reader, "tokenizer.ggml.token_type") or [NORMAL] * len(texts)
    byte_level = _value(reader, "tokenizer.ggml.model") == "gpt2"
    special = {id for id, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, BYTE)}
    special |= set(_token_ids(reader).values()) | {id for id, text in enumerate(texts) if text in END_TOKENS}
    pieces = [
        b"" if kind in (CONTROL, UNUSED) else piece_bytes(text, byte_level=byte_level)
        for text, kind in zip(texts, types, strict=True)
    ]
    return Vocabulary(pieces, frozenset(id for id in special if id < len(texts)))


def piece_bytes(text: str, *, byte_level: bool) -> bytes:
    """The bytes that a token prints. Its text is in GPT-2's byte alphabet, or has SentencePiece's mark for a space."""
    if not byte_level:
        return text.replace("\u2581", " ").encode()
    try:
        return bytes(_BYTE_OF[char] for char in text)
    except KeyError:  # an added token, whose text is not in the byte alphabet
        return text.encode()


def head_shape(path: Path) -> HeadShape:
    """The sizes of the head and of the other weights in the file. UsageError for an unknown architecture."""
    reader = _open(path)
    _architecture(reader, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    head = tensors.get(HEAD, tensors[TABLE])
    rows = int(head.shape[1])
    body = sum(int(tensor.n_bytes) for name, tensor in tensors.items() if name not in (TABLE, HEAD))
    return HeadShape(rows, int(head.shape[0]), HEAD not in tensors, int(head.n_bytes) // rows, body)


def trim(
    source: Path,
    ids: IntArray,
    out: Path,
    *,
    quantize: str | None = None,
    threads: int = 2,
    built: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the folder `out`: the model with the rows `ids` in its head, the full embedding table, and the manifest.

    ids       int32[n], ascending
    quantize  the weight format of the drafter, one of `requantise.FORMATS`; as in the source where None
    built     facts about the build, for the manifest
    UsageError for a damaged file, an unknown architecture or invalid ids; SpecplugError where writing fails.
    """
    reader = open_reader(source)
    with drafter_folders.writing(out) as partial:
        manifest = manifest_of(reader, source, ids, built)
        write_model(reader, ids, partial / MODEL, quantize=quantize, threads=threads)
        write_table(reader, partial / EMBEDDINGS)
        return drafter_folders.finish(partial, manifest, ids)


def open_reader(source: Path, *, any_head: bool = False) -> Any:
    """A gguf.GGUFReader of a model. UsageError for a damaged file, and, unless `any_head`, for one whose head cannot be
    trimmed."""
    check_gguf(source)
    reader = _open(source)
    if not any_head:
        _architecture(reader, source)
    return reader


def has_known_head(reader: Any) -> bool:
    """Whether the head of a model can be trimmed."""
    architecture = str(_value(reader, "general.architecture"))
    scaled_otherwise = _value(reader, f"{architecture}.embedding_scale") is not None
    has_table = any(tensor.name == TABLE for tensor in reader.tensors)
    return architecture in (*UNSCALED, *SCALED) and has_table and not scaled_otherwise


def manifest_of(reader: Any, source: Path, ids: IntArray, built: Mapping[str, Any] | None) -> Manifest:
    """The manifest of a drafter with the rows `ids`, before its files are known. UsageError for invalid ids."""
    (table,) = (tensor for tensor in reader.tensors if tensor.name == TABLE)
    num_tokens, width = int(table.shape[1]), int(table.shape[0])
    check_ids(ids, num_tokens, source)
    architecture = str(_value(reader, "general.architecture"))
    return Manifest(
        format="gguf",
        kind="model",
        architecture=architecture,
        tokenizer=tokenizer_hash(source),
        num_tokens=num_tokens,
        rows=len(ids),
        input_scale=sqrt(width) if architecture in SCALED else 1.0,
        source=fingerprint.model_identity(source),
        built=dict(built or {}),
    )


def trimmed_bytes(path: Path, rows: int | None, quantize: str | None) -> int:
    """Bytes of the drafter's folder, up to metadata; with the full head where `rows` is None.

    quantize  the weight format, one of `requantise.FORMATS`; as in the file where None
    """
    reader = _open(path)
    _architecture(reader, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    table, head = tensors[TABLE], tensors.get(HEAD, tensors[TABLE])
    kept = min(1.0, rows / int(head.shape[1])) if rows is not None else 1.0
    others = [tensor for name, tensor in tensors.items() if name not in (TABLE, HEAD)]
    if quantize is None:
        body, head_bytes = sum(int(tensor.n_bytes) for tensor in others), int(head.n_bytes)
    else:
        body = round(sum(int(tensor.n_elements) for tensor in others) * BITS[quantize] / 8)
        head_bytes = round(int(head.n_elements) * BITS[head_format(quantize)] / 8)
    untied = round(kept * int(table.n_bytes)) if HEAD in tensors else 0
    return body + round(kept * head_bytes) + untied + int(table.n_bytes)


def check_ids(ids: IntArray, num_tokens: int, source: Path) -> None:
    """Raise UsageError unless `ids` is a non-empty, ascending list of ids of the vocabulary."""
    if not len(ids) or ids[0] < 0 or ids[-1] >= num_tokens or (np.diff(ids) <= 0).any():
        raise UsageError(f"{source}: the kept ids are not ascending ids below {num_tokens}; choose others")


def head_format(quantize: str) -> str:
    """The weight format of the head of a drafter in this format."""
    return quantize if quantize in LARGE_FORMATS else EIGHT_BITS


def check_architecture(architecture: str | None, path: Path, name: str | None = None) -> None:
    """UsageError unless heads of this architecture can be trimmed.

    name  of the architecture for the message, where it differs
    """
    known = (*UNSCALED, *SCALED)
    if architecture not in known:
        found = name or architecture
        raise UsageError(f"{path}: the head of architecture {found} is not known; known: {', '.join(known)}")


def num_layers(reader: Any) -> int:
    """Number of layers of a model, those that predict further tokens included."""
    return int(_value(reader, f"{_value(reader, 'general.architecture')}.block_count"))


def write_model(
    reader: Any,
    ids: IntArray,
    path: Path,
    *,
    layers: int | None = None,
    quantize: str | None = None,
    threads: int = 2,
) -> None:
    """Write the model with the rows `ids` in its head.

    layers  number of first layers to keep; all where None
    """
    from gguf import GGUFWriter

    architecture, every = _value(reader, "general.architecture"), num_layers(reader)
    kept = every if layers is None else layers
    writer = GGUFWriter(path, architecture)
    copy_tokenizer(reader, ids, writer)
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "tokenizer.")) or key == "general.architecture":
            continue
        value = field.contents()
        if key == f"{architecture}.vocab_size":
            value = len(ids)
        elif key == f"{architecture}.block_count":
            value = kept
        elif key == f"{architecture}.nextn_predict_layers" and kept < every:
            value = 0  # these are the last of all layers
        elif key.startswith(f"{architecture}.") and isinstance(value, list) and len(value) == every:
            value = value[:kept]  # one value per layer
        _add(writer, key, field, value)
    for tensor in reader.tensors:
        layer = _layer_of(tensor.name)
        if layer is None or layer < kept:
            data = tensor.data[ids] if tensor.name in (TABLE, HEAD, "output.bias") else tensor.data
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    flush(writer)
    if quantize is not None:
        requantise(path, path, quantize, threads=threads, head=head_format(quantize), least_squares=True)


def copy_tokenizer(reader: Any, ids: IntArray, writer: Any) -> None:
    """Add the tokenizer of the model, with the tokens `ids` alone, to a file."""
    lists = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")}
    row_of = {id: row for row, id in enumerate(ids.tolist())}
    token_ids = _token_ids(reader)
    for key, field in reader.fields.items():
        if not key.startswith("tokenizer.") or key == "tokenizer.chat_template":
            continue
        value = field.contents()
        if key in token_ids:
            if value not in row_of:
                continue
            value = row_of[value]
        elif key in lists:
            value = [value[id] for id in ids.tolist()]
        _add(writer, key, field, value)


def write_table(reader: Any, path: Path) -> None:
    """Write the full embedding table."""
    from gguf import GGUFWriter

    (table,) = (tensor for tensor in reader.tensors if tensor.name == TABLE)
    writer = GGUFWriter(path, "embeddings")
    writer.add_tensor(TABLE, table.data, raw_dtype=table.tensor_type)
    flush(writer)


def _add(writer: Any, key: str, field: Any, value: Any) -> None:
    from gguf import GGUFValueType

    kind = field.types[0]
    writer.add_key_value(key, value, kind, sub_type=field.types[-1] if kind == GGUFValueType.ARRAY else None)


def _layer_of(tensor: str) -> int | None:
    """The layer that a tensor belongs to; None for those of the complete model."""
    parts = tensor.split(".")
    return int(parts[1]) if parts[0] == "blk" else None


def flush(writer: Any) -> None:
    """Write a file whose metadata and tensors were added."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    require_one_file(path)
    return GGUFReader(path)


def _architecture(reader: Any, path: Path) -> str:
    architecture = str(_value(reader, "general.architecture"))
    check_architecture(architecture if has_known_head(reader) else None, path, architecture)
    return architecture


def _token_ids(reader: Any) -> dict[str, int]:
    """The metadata keys that name a token, with the token's id."""
    keys: Iterable[str] = (key for key in reader.fields if key.startswith("tokenizer.ggml."))
    return {key: int(_value(reader, key)) for key in keys if key.endswith("_token_id")}


def _strings(reader: Any, key: str) -> list[str]:
    return list(_value(reader, key) or ())


def _value(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes stand for themselves, the others are numbered from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _alphabet()
