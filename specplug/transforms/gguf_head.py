"""Trims the head of a GGUF model: a drafter that llama.cpp loads as it is, with the rows that are asked for.

Knows GGUF files. Knows neither why these rows were chosen nor who drafts with them.
Source: VocabTrim (arXiv 2506.22694). Blocks of every weight format lie within a row, so rows are copied as they are.
What goes in keeps the whole vocabulary: the embedding table lies in a file of its own, and its rows are fed as
embeddings. llama.cpp scales embeddings in some architectures for tokens alone; the manifest says by how much.
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
from specplug.models.references import check_gguf, tokenizer_hash
from specplug.transforms.dequantise import END_TOKENS
from specplug.transforms.head_shape import HeadShape
from specplug.transforms.kept_ids import Vocabulary
from specplug.transforms.requantise import requantise

MODEL = "model.gguf"
EMBEDDINGS = "embeddings.gguf"
"""Names in the folder: the drafter, and its input's whole table."""

TABLE, HEAD = "token_embd.weight", "output.weight"
"""Tensor names; a model without the second has tied ones."""

SCALED = ("gemma", "gemma2", "gemma3")
"""Architectures in which llama.cpp multiplies a token's embedding, but no other input, by sqrt(width)."""

PLAIN = ("llama", "qwen2", "qwen3", "smollm3", "olmo2", "phi3")
"""Architectures in which an embedding goes in as it is."""

FOUR_BITS, EIGHT_BITS = ("q4_0", "q4_1", "iq4_nl"), "q8_0"
"""A drafter in the first has its head in the second: four bits in so few rows save little, and cost many right guesses
(docs/lab-book/trimmed-heads.md)."""

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
"""Token types of GGUF; 4 is a user-defined token, which is text."""


def vocabulary(path: Path) -> Vocabulary:
    """What is known of every token of a GGUF model."""
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
    """What a token prints: from GPT-2's alphabet of bytes, or with SentencePiece's mark for a blank."""
    if not byte_level:
        return text.replace("\u2581", " ").encode()
    try:
        return bytes(_BYTE_OF[char] for char in text)
    except KeyError:  # text of a token that was added as it is
        return text.encode()


def head_shape(path: Path) -> HeadShape:
    """Sizes of the head and of the rest, as the file holds them. UsageError for an unknown architecture."""
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
    """Write the folder `out`: the model with the rows `ids` in its head, the whole embedding table, the manifest.

    ids       int32[n], ascending
    quantize  format of the drafter's weights, of `requantise.HEADS`; as in the source where None
    built     for the manifest
    UsageError for a damaged file, an unknown architecture or ids that do not fit; SpecplugError where the disk refuses.
    """
    check_gguf(source)
    reader = _open(source)
    architecture = _architecture(reader, source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    num_tokens, width = int(tensors[TABLE].shape[1]), int(tensors[TABLE].shape[0])
    check_ids(ids, num_tokens, source)
    with drafter_folders.writing(out) as partial:
        model = partial / MODEL
        _write_model(reader, architecture, ids, model)
        if quantize is not None:
            head = EIGHT_BITS if quantize in FOUR_BITS else quantize
            requantise(model, model, quantize, threads=threads, head=head, least_squares=True)
        _write_table(tensors[TABLE], partial / EMBEDDINGS)
        manifest = Manifest(
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
        return drafter_folders.finish(partial, manifest, ids)


def check_ids(ids: IntArray, num_tokens: int, source: Path) -> None:
    """UsageError unless `ids` are ascending ids of the vocabulary, at least one."""
    if not len(ids) or ids[0] < 0 or ids[-1] >= num_tokens or (np.diff(ids) <= 0).any():
        raise UsageError(f"{source}: the kept ids are not ascending ids below {num_tokens}; choose others")


def _write_model(reader: Any, architecture: str, ids: IntArray, path: Path) -> None:
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    lists = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")}
    number_of = {id: number for number, id in enumerate(ids.tolist())}
    token_ids = _token_ids(reader)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "tokenizer.chat_template"):
            continue
        value, kind = field.contents(), field.types[0]
        if key in token_ids:
            if value not in number_of:
                continue
            value = number_of[value]
        elif key == f"{architecture}.vocab_size":
            value = len(ids)
        elif key in lists:
            value = [value[id] for id in ids.tolist()]
        sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, kind, sub_type=sub)
    for tensor in reader.tensors:
        data = tensor.data[ids] if tensor.name in (TABLE, HEAD, "output.bias") else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    _flush(writer)


def _write_table(table: Any, path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "embeddings")
    writer.add_tensor(TABLE, table.data, raw_dtype=table.tensor_type)
    _flush(writer)


def _flush(writer: Any) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(path)


def _architecture(reader: Any, path: Path) -> str:
    architecture = str(_value(reader, "general.architecture"))
    known = (*PLAIN, *SCALED)
    scaled_otherwise = _value(reader, f"{architecture}.embedding_scale") is not None
    if architecture not in known or scaled_otherwise or all(tensor.name != TABLE for tensor in reader.tensors):
        raise UsageError(f"{path}: the head of architecture {architecture} is not known; known: {', '.join(known)}")
    return architecture


def _token_ids(reader: Any) -> dict[str, int]:
    """Keys that name a token, and which."""
    keys: Iterable[str] = (key for key in reader.fields if key.startswith("tokenizer.ggml."))
    return {key: int(_value(reader, key)) for key in keys if key.endswith("_token_id")}


def _strings(reader: Any, key: str) -> list[str]:
    return list(_value(reader, key) or ())


def _value(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(rest)}


_BYTE_OF = _alphabet()
