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

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.models import drafter_folders
from specplug.models.drafter_folders import EARLY_EXIT, Exit, Manifest
from specplug.models.gguf_header import read_header
from specplug.models.model_facts import memory_kind
from specplug.models.references import check_gguf
from specplug.transforms.gguf_head import (
    EMBEDDINGS,
    SCALED,
    UNSCALED,
    has_known_head,
    manifest_of,
    open_reader,
    write_model,
    write_table,
)
from specplug.transforms.gguf_states_head import NORM_AND_HEAD, write_norm_and_head

RMS_HEADS = ("llama", "qwen3")
"""Architectures whose output is a matrix times an RMS norm, without a bias or a limit of the logits."""


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
            norm = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
            epsilon = float(reader.fields[f"{manifest.architecture}.attention.layer_norm_rms_epsilon"].contents())
            write_norm_and_head(reader, ids, partial / NORM_AND_HEAD, norm=norm.data, epsilon=epsilon)
        if trimmed:
            write_table(reader, partial / EMBEDDINGS)
        found = tuple(Exit(layers, file_of(layers), layers) for layers in exits)
        return drafter_folders.finish(partial, replace(manifest, kind=EARLY_EXIT, exits=found), ids)


def file_of(layers: int) -> str:
    """The name of the drafter with so many layers."""
    return f"exit-{layers}.gguf"


def _list(exits: Sequence[int]) -> str:
    return ",".join(map(str, exits))
