"""Writes a tiny random model in given tensor types, on which a native library and its kernels can be tried.

Its matrices are quantised by the library that is tried, but for a few types. Does not open the model.
Source: the GGUF keys and tensor names of the architecture `llama` (github.com/ggml-org/llama.cpp, src/llama-arch.cpp).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from specplug.engines.llama_cpp.library_check import library_folder
from specplug.models.gguf_header import TYPE_SIZES

WIDTH = 256
"""Numbers of a row: the largest block of ggml's types."""

NUM_TOKENS = 64
"""Size of the vocabulary."""

QUANTISED_ROWS = 8
"""Rows of a matrix that are quantised."""

IQ1_M = 29

SLOW_TYPES = frozenset({16, 17, 18, 19, 21, 22, IQ1_M})
"""Types (iq1, iq2, iq3) whose quantiser takes seconds to start. Their blocks get a scale and arbitrary codes; those of
IQ1_M, which divides its scale among other fields, are all zero."""

MOST_BYTES = 2 << 20
"""Size of the file; with fewer attention heads where they would make it larger."""

MOST_HEADS = 8
"""Most attention heads that share keys and values."""

F32 = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention of a model: heads that share the keys and values of one, and the numbers of a head."""

    sharing: int = 1
    head: int = 64


def write_tiny_model(path: Path, types: list[int], shape: Shape) -> None:
    """One layer for each of `types`, which are numbers of ggml. Raises KeyError for a type that is unknown here."""
    types = types or [F32]
    head = max(16, min(shape.head, WIDTH))
    kv_heads = WIDTH // gcd(WIDTH, head)
    kv_heads = max(kv_heads, 2 if head * 2 <= WIDTH else 1)
    sharing = max(1, min(shape.sharing, MOST_HEADS))
    while sharing > 1 and _bytes(types, kv_heads * sharing * head, kv_heads * head) > MOST_BYTES:
        sharing -= 1
    heads = kv_heads * sharing
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(len(types))
    writer.add_context_length(1 << 17)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head - head % 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(NUM_TOKENS)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int, kind: int) -> None:
        weights = (random.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)
        if columns % TYPE_SIZES[kind][0]:
            kind = F32
        data = weights if kind == F32 else _quantised(weights, kind)
        raw = None if kind == F32 else GGMLQuantizationType(kind)
        writer.add_tensor(name, data, raw_dtype=raw)

    add("token_embd.weight", NUM_TOKENS, WIDTH, types[0])
    add("output.weight", NUM_TOKENS, WIDTH, types[-1])
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer, kind in enumerate(types):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}{norm}.weight", np.ones(WIDTH, np.float32))
        add(f"{block}attn_q.weight", heads * head, WIDTH, kind)
        add(f"{block}attn_k.weight", kv_heads * head, WIDTH, kind)
        add(f"{block}attn_v.weight", kv_heads * head, WIDTH, kind)
        add(f"{block}attn_output.weight", WIDTH, heads * head, kind)
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            add(f"{block}{name}.weight", WIDTH, WIDTH, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _bytes(types: list[int], query_width: int, key_width: int) -> int:
    weights = WIDTH * (2 * query_width + 2 * key_width + 3 * WIDTH)
    return sum(weights * TYPE_SIZES[kind][1] // TYPE_SIZES[kind][0] for kind in types)


def _quantised(weights: npt.NDArray[np.float32], kind: int) -> npt.NDArray[np.uint8]:
    """uint8[rows, bytes]: a matrix in one of ggml's types, with the same few rows again and again."""
    columns, rows = weights.shape[1], min(QUANTISED_ROWS, len(weights))
    block, size = TYPE_SIZES[kind]
    result = np.zeros((rows, columns // block * size), dtype=np.uint8)
    if kind in SLOW_TYPES:
        blocks = result.reshape(-1, size)
        if kind != IQ1_M:
            blocks[:] = np.arange(blocks.size, dtype=np.uint8).reshape(blocks.shape)
            blocks[:, :2] = np.frombuffer(np.float16(2**-10).tobytes(), dtype=np.uint8)
        return np.resize(result, (len(weights), result.shape[1]))
    ones = np.ones(columns, dtype=np.float32)  # the importance of each column, which some types require
    quantise = _quantiser()
    floats, void = ctypes.POINTER(ctypes.c_float), ctypes.c_void_p
    quantise(
        kind,
        weights.ctypes.data_as(floats),
        result.ctypes.data_as(void),
        0,
        rows,
        columns,
        ones.ctypes.data_as(floats),
    )
    return np.resize(result, (len(weights), result.shape[1]))


def _quantiser() -> Any:
    """ggml_quantize_chunk of the loaded library."""
    floats = ctypes.POINTER(ctypes.c_float)
    found = next(path for path in sorted(library_folder().iterdir()) if "ggml-base" in path.name)
    function = ctypes.CDLL(str(found)).ggml_quantize_chunk
    number = ctypes.c_int64
    function.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, number, number, number, floats]
    function.restype = ctypes.c_size_t
    return function
