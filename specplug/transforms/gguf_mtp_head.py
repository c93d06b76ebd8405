"""Writes some rows of the output matrix that the MTP layers of a GGUF model share with it.

Source: VocabTrim (arXiv 2506.22694). The layers themselves stay in the model's file. The module does not depend on how
the rows were chosen or on how they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.models import drafter_folders
from specplug.models.drafter_folders import MTP_HEAD, Manifest
from specplug.models.gguf_header import Header, read_header
from specplug.models.model_facts import MTP_STATES_WITH_LOGITS, has_mtp_layer
from specplug.transforms.gguf_head import HEAD, head_format, manifest_of, open_reader
from specplug.transforms.gguf_states_head import NORM_AND_HEAD, output_matrix, write_norm_and_head
from specplug.transforms.head_shape import HeadShape
from specplug.transforms.requantise import BITS, requantise

EPSILON = 1e-6
"""That of a norm without weights before the kept rows, which is undone: the layers give states that had theirs."""

OWN_MATRIX = "nextn.shared_head_head.weight"
"""How the name of an output matrix ends that belongs to one MTP layer."""


def has_mtp(source: Path) -> bool:
    """Whether what is trimmed of a GGUF file is the output matrix of MTP layers."""
    return has_mtp_layer(read_header(source))


def check_trimmable(source: Path) -> None:
    """Raise UsageError where rows of the output matrix alone do not give the logits of all MTP layers of a model."""
    header = read_header(source)
    if header.architecture in MTP_STATES_WITH_LOGITS:
        raise UsageError(
            f"{source}: of the architecture {header.architecture} llama.cpp gives the states of MTP layers only "
            "together with all logits, so that nothing is saved; draft with the complete matrix"
        )
    if any(name.endswith(OWN_MATRIX) for name in header.tensors) and _num_layers(header) > 1:
        raise UsageError(f"{source}: its MTP layers have output matrices of their own; only a shared one is trimmed")
    scaled = [name for name in header.tensors if name in ("output.scale", OWN_MATRIX.replace("weight", "scale"))]
    if scaled:
        raise UsageError(f"{source}: its output matrix has a scale beside it ({scaled[0]}), which is not supported")


def mtp_head_shape(path: Path, head: Path | None = None) -> HeadShape:
    """The sizes of the output matrix, and of the MTP layer that drafts.

    head  a folder of `trim_mtp` with all rows, where they are in another format than in the model
    """
    reader = open_reader(path, any_head=True)
    first = _first_layer(read_header(path))
    prefix, matrix = f"blk.{first}.", output_matrix(reader, first)
    matrices = ("nextn.embed_tokens.weight", OWN_MATRIX)
    body = sum(
        int(tensor.n_bytes)
        for tensor in reader.tensors
        if tensor.name.startswith(prefix) and not tensor.name.endswith(matrices)
    )
    stored = output_matrix(open_reader(head / NORM_AND_HEAD)) if head is not None else matrix
    rows = int(matrix.shape[1])
    tied = matrix.name not in (HEAD, f"{prefix}{OWN_MATRIX}")
    return HeadShape(rows, int(matrix.shape[0]), tied, int(stored.n_bytes) // rows, body)


def trim_mtp(
    source: Path,
    ids: IntArray,
    out: Path,
    *,
    quantize: str | None = None,
    threads: int = 2,
    built: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the folder `out`: the rows `ids` of the output matrix, and the manifest. Errors and arguments are those of
    `gguf_head.trim`."""
    check_trimmable(source)
    reader = open_reader(source, any_head=True)
    first = _first_layer(read_header(source))
    width = int(output_matrix(reader, first).shape[0])
    with drafter_folders.writing(out) as partial:
        manifest = replace(manifest_of(reader, source, ids, built), kind=MTP_HEAD)
        path = partial / NORM_AND_HEAD
        norm = np.ones(width, dtype=np.float32)
        write_norm_and_head(reader, ids, path, norm=norm, epsilon=EPSILON, layer=first)
        if quantize is not None:
            requantise(path, path, quantize, threads=threads, head=head_format(quantize), least_squares=True)
        return drafter_folders.finish(partial, manifest, ids)


def trimmed_mtp_bytes(path: Path, rows: int | None, quantize: str | None) -> int:
    """Bytes of such a folder, up to metadata; with all rows where `rows` is None."""
    shape = mtp_head_shape(path)
    kept = shape.num_tokens if rows is None else min(rows, shape.num_tokens)
    bits = None if quantize is None else BITS[head_format(quantize)]
    return kept * shape.row_bytes if bits is None else round(kept * shape.width * bits / 8)


def _num_layers(header: Header) -> int:
    count = header.numbers.get("nextn_predict_layers", 0)
    return count if isinstance(count, int) else max(count)


def _first_layer(header: Header) -> int:
    """The number of the first MTP layer."""
    return header.num_layers - _num_layers(header)
