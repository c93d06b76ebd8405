"""Writes a GGUF again in another weight format, through llama.cpp's own quantiser.

Knows format names. Knows nothing of what the file is for.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from specplug.errors import SpecplugError, UsageError

FORMATS = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q4_k_m": 15, "bf16": 32}
"""Format name to llama.cpp's `llama_ftype` number."""


def requantise(source: Path, target: Path, fmt: str, *, threads: int = 2) -> Path:
    """Write `source` as `target` in format `fmt`; the file appears whole or not at all.

    Raises UsageError for an unknown format, SpecplugError when llama.cpp refuses the file.
    """
    if fmt not in FORMATS:
        raise UsageError(f"format {fmt!r} is unknown; use one of {', '.join(FORMATS)}")
    import llama_cpp.llama_cpp as ll

    params = ll.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = FORMATS[fmt]
    params.allow_requantize = True
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        code = ll.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(params))
        if code != 0:
            raise SpecplugError(f"{source}: llama.cpp could not write it as {fmt} (code {code})")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target
