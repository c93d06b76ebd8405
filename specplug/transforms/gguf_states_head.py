"""Writes an output matrix with some of its rows as a model of its own, whose input is a hidden state.

Stock llama.cpp loads it. The module does not depend on where the states come from, or on how the rows were chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.transforms.gguf_head import HEAD, TABLE, copy_tokenizer, flush

NORM_AND_HEAD = "norm-and-head.gguf"
"""File in a drafter's folder: such a model."""

IDENTITY_WIDTH = 32
"""Width of the attention and the feed-forward network of a layer that adds zero to its input."""


def output_matrix(reader: Any, layer: int | None = None) -> Any:
    """The tensor of the output matrix of a gguf.GGUFReader.

    layer  that of an MTP layer with this number, which may have its own
    """
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    own = tensors.get(f"blk.{layer}.nextn.shared_head_head.weight")
    return own if own is not None else tensors.get(HEAD, tensors[TABLE])


def write_norm_and_head(
    reader: Any,
    ids: IntArray,
    path: Path,
    *,
    norm: npt.NDArray[np.float32],
    epsilon: float,
    layer: int | None = None,
) -> None:
    """Write an RMS norm, and the rows `ids` of the output matrix, as a model of the architecture `llama`.

    norm     float32[width]: the weights of the norm
    epsilon  that of the norm
    layer    as for `output_matrix`

    llama.cpp opens no model without layers, so it has one that adds zero to its input. The rows are its embedding
    table, too, which is not used: a pass is given states.
    """
    from gguf import GGUFWriter

    matrix = output_matrix(reader, layer)
    width, size = int(matrix.shape[0]), IDENTITY_WIDTH
    writer = GGUFWriter(path, "llama")
    copy_tokenizer(reader, ids, writer)
    writer.add_block_count(1)
    writer.add_context_length(1 << 12)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(size)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(epsilon)
    writer.add_vocab_size(len(ids))
    writer.add_tensor(TABLE, matrix.data[ids], raw_dtype=matrix.tensor_type)
    writer.add_tensor("output_norm.weight", norm.astype(np.float32))
    shapes = {
        "attn_norm": (width,), "attn_q": (size, width), "attn_k": (size, width), "attn_v": (size, width),
        "attn_output": (width, size), "ffn_norm": (width,), "ffn_gate": (size, width), "ffn_up": (size, width),
        "ffn_down": (width, size),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, dtype=np.float32))
    flush(writer)
