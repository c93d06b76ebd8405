"""Writes a GGUF file in another weight format, with llama.cpp's own quantiser."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from specplug.errors import SpecplugError, UsageError

FORMATS = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q8_0": 7, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "bf16": 32,
}  # fmt: skip
"""Format name to llama.cpp's `llama_ftype` number."""

BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.56, "q5_k_m": 5.7, "q5_k_s": 5.54, "q5_0": 5.5,
    "q4_1": 5.0, "q4_k_m": 4.89, "q4_k_s": 4.67, "q4_0": 4.5, "iq4_nl": 4.5, "q3_k_l": 4.22, "q3_k_m": 3.89,
    "q3_k_s": 3.5, "q2_k": 3.16,
}  # fmt: skip
"""Bits per weight of each format, on average over a model's matrices, for estimates of sizes: from the block sizes, and
for mixed formats as llama.cpp's quantiser lists them for Llama-3.1-8B."""

HEADS = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
"""The formats that a head can have, with the `ggml_type` number of its tensor."""


def requantise(
    source: Path, target: Path, fmt: str, *, threads: int = 2, head: str | None = None, least_squares: bool = False
) -> Path:
    """Write `source` as `target` in format `fmt`; the file appears completely or not at all. Both may be one path.

    head           format of the head, or of the embedding table that serves as one; llama.cpp's choice where None
    least_squares  search for the scale of each block that minimises the squared error. llama.cpp does so when it
                   receives an importance matrix; here all weights get the same importance
    Raises UsageError for an unknown format, SpecplugError when llama.cpp refuses the file.
    """
    for name, known in ((fmt, FORMATS), (head or "q8_0", HEADS)):
        if name not in known:
            raise UsageError(f"format {name!r} is unknown; use one of {', '.join(known)}")
    import llama_cpp.llama_cpp as ll

    params = ll.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = FORMATS[fmt]
    params.allow_requantize = True
    if head is not None:
        params.output_tensor_type = params.token_embedding_type = HEADS[head]
    if least_squares:
        entries, _ones = _uniform_importances(source)  # `_ones` keeps the memory alive that the entries point to
        params.imatrix = entries
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with _silence():
            code = ll.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(params))
        if code != 0:
            raise SpecplugError(f"{source}: llama.cpp could not write it as {fmt} (code {code})")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _uniform_importances(source: Path) -> tuple[Any, Any]:
    """llama.cpp's importance matrix with the value 1 for every column of every tensor, and the array of ones in it.

    An empty entry ends the matrix.
    """
    import llama_cpp.llama_cpp as ll
    from gguf import GGUFReader

    matrices = [(tensor.name, int(tensor.shape[0])) for tensor in GGUFReader(source).tensors if len(tensor.shape) == 2]
    ones = np.ones(max((width for _, width in matrices), default=0), dtype=np.float32)
    entries = (ll.llama_model_imatrix_data * (len(matrices) + 1))()
    for entry, (name, width) in zip(entries, matrices, strict=False):
        entry.name, entry.size = name.encode(), width
        entry.data = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries, ones


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress llama.cpp's log line for every tensor."""
    import llama_cpp._logger as llama_logger
    import llama_cpp.llama_cpp as ll

    ignore = ll.llama_log_callback(lambda level, text, user: None)
    ll.llama_log_set(ignore, ctypes.c_void_p(0))
    try:
        yield
    finally:
        ll.llama_log_set(llama_logger.llama_log_callback, ctypes.c_void_p(0))
