"""Writes drafters that have the first layers of a GGUF model, each with the model's norm and a trimmed head.

Source: early exit as in LayerSkip (arXiv 2404.16710) and DEL (arXiv 2504.05598), here as files that stock llama.cpp
loads. A layer is copied unchanged, so the keys and values that it computes are those of the source model. Where the
head cannot be trimmed, exits have all of it, and embed tokens themselves. llama.cpp's quantiser can leave layers out,
too; here the same code that trims heads does, which also shortens metadata that has a value per layer. The module does
not depend on how exits or rows were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.models import drafter_folders
from specplug.models.drafter_folders import EARLY_EXIT, Exit, Manifest
from specplug.models.gguf_header import read_header
from specplug.models.model_facts import memory_kind
from specplug.models.references import check_gguf
from specplug.transforms.gguf_head import (
    EMBEDDINGS,
    HEAD,
    SCALED,
    TABLE,
    UNSCALED,
    copy_tokenizer,
    flush,
    has_known_head,
    manifest_of,
    open_reader,
    write_model,
    write_table,
)

NORM_AND_HEAD = "norm-and-head.gguf"
"""File in the folder: a model without layers, whose input is a hidden state of the source model."""

RMS_HEADS = ("llama", "qwen3")
"""Architectures whose output is a matrix times an RMS norm, without a bias or a limit of the logits."""

IDENTITY_WIDTH = 32
"""Width of the attention and the feed-forward network of a layer that adds zero to its input."""


def layers_of(source: Path) -> int:
    """The number of layers of a model that an exit can follow. UsageError for a model that cannot be cut.

    Where its architecture is not one of those whose heads are trimmed, all layers have to be attention to all tokens.
    """
    check_gguf(source)
    header = read_header(source)
    kind = memory_kind(header.numbers)
    if header.architecture not in (*UNSCALED, *SCALED) and kind != "attention":
        raise UsageError(
            f"{source}: its memory is {kind}; of architecture {header.architecture} no first layers can be drafters"
        )
    extra = header.numbers.get("nextn_predict_layers") or 0
    return header.num_layers - (extra if isinstance(extra, int) else 0)


def trims_head(source: Path) -> bool:
    """Whether exits of a model get a head with some of its rows; else they have the complete one."""
    return has_known_head(open_reader(source, any_head=True))


def check_exits(exits: Sequence[int], layers: int, source: Path) -> None:
    """UsageError unless `exits` ascend and are numbers of layers that leave at least one of `layers` out."""
    if not exits or any(later <= before for before, later in pairwise(exits)):
        raise UsageError(f"--exits {_list(exits)}: name numbers of layers in ascending order, such as 4,8,12")
    if exits[0] < 1 or exits[-1] >= layers:
        raise UsageError(f"--exits {_list(exits)}: {source.name} has {layers} layers; use 1 to {layers - 1}")


def write_exits(
    source: Path,
    exits: Sequence[int],
    ids: IntArray,
    out: Path,
    *,
    quantize: str | None = None,
    threads: int = 2,
    built: Mapping[str, Any] | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Manifest:
    """Write the folder `out`: a drafter for each exit, the full embedding table if heads are trimmed, the manifest.

    exits     numbers of layers, ascending
    ids       int32[n], ascending: the rows of the head
    quantize  weight format of the drafters, one of `requantise.FORMATS`; as in the source where None
    Errors are those of `gguf_head.trim`; UsageError for exits that the model does not have.
    """
    reader = open_reader(source, any_head=True)
    check_exits(exits, layers_of(source), source)
    trimmed = has_known_head(reader)
    with drafter_folders.writing(out) as partial:
        manifest = manifest_of(reader, source, ids, built)
        if not trimmed and len(ids) < manifest.num_tokens:
            raise UsageError(f"{source}: heads of architecture {manifest.architecture} are not trimmed; keep all rows")
        for done, layers in enumerate(exits):
            progress(done / len(exits))
            write_model(reader, ids, partial / file_of(layers), layers=layers, quantize=quantize, threads=threads)
        if trimmed and manifest.architecture in RMS_HEADS:
            write_norm_and_head(reader, ids, partial / NORM_AND_HEAD)
        if trimmed:
            write_table(reader, partial / EMBEDDINGS)
        found = tuple(Exit(layers, file_of(layers), layers) for layers in exits)
        return drafter_folders.finish(partial, replace(manifest, kind=EARLY_EXIT, exits=found), ids)


def file_of(layers: int) -> str:
    """The name of the drafter with so many layers."""
    return f"exit-{layers}.gguf"


def write_norm_and_head(reader: Any, ids: IntArray, path: Path) -> None:
    """Write the norm and the rows `ids` of the head as a model of the architecture `llama`.

    llama.cpp opens no model without layers, so it has one that adds zero to its input.
    """
    from gguf import GGUFWriter

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    width, size = int(tensors[TABLE].shape[0]), IDENTITY_WIDTH
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
    writer.add_layer_norm_rms_eps(reader.fields[f"{architecture}.attention.layer_norm_rms_epsilon"].contents())
    writer.add_vocab_size(len(ids))
    for name in (TABLE, HEAD, "output_norm.weight"):
        if name in tensors:
            data = tensors[name].data if name == "output_norm.weight" else tensors[name].data[ids]
            writer.add_tensor(name, data, raw_dtype=tensors[name].tensor_type)
    shapes = {
        "attn_norm": (width,), "attn_q": (size, width), "attn_k": (size, width), "attn_v": (size, width),
        "attn_output": (width, size), "ffn_norm": (width,), "ffn_gate": (size, width), "ffn_up": (size, width),
        "ffn_down": (width, size),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, dtype=np.float32))
    flush(writer)


def _list(exits: Sequence[int]) -> str:
    return ",".join(map(str, exits))
