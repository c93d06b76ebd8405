"""The hidden states between the layers of the target, for every row of a pass.

llama.cpp has no public function for them; its library exports two under their C++ names. They abort the process where
an architecture does not record the inputs of its layers, so only those are served of which this is known.
Source: `llama_set_embeddings_layer_inp` (github.com/ggml-org/llama.cpp, src/llama-ext.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import llama_cpp.llama_cpp as ll
import numpy as np
import numpy.typing as npt

from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.model import Model

ARCHITECTURES = ("llama", "qwen3")
"""Architectures, by `general.architecture`, in which this was run (tests/test_early_exit.py)."""

SET_NAMES = ("llama_set_embeddings_layer_inp", "_Z30llama_set_embeddings_layer_inpP13llama_contextjb")
GET_NAMES = ("llama_get_embeddings_layer_inp", "_Z30llama_get_embeddings_layer_inpP13llama_contextj")

HiddenStates = npt.NDArray[np.float32]


def why_not(model: Model) -> str | None:
    """Why the hidden states of a model cannot be read; None where they can."""
    architecture = model.meta("general.architecture")
    if architecture not in ARCHITECTURES:
        return f"llama.cpp is not known to record the inputs of the layers of architecture {architecture}"
    return None if _functions() else "this build of llama.cpp does not export the inputs of layers"


class LayerTaps:
    """Records the input of some layers in every pass of a context: that of layer n is the output of the first n layers.

    State: in llama.cpp, float32[n_batch, width] per layer. Cost: a copy of so many numbers per row.
    """

    def __init__(self, context: Context, layers: Sequence[int]) -> None:
        """`layers` are at least 1 and below the number of layers of a model for which `why_not` is None.

        width  numbers of a hidden state
        """
        functions = _functions()
        assert functions is not None
        self._context = context
        self.width = context.model.width
        set_tap, self._get = functions
        for layer in layers:
            set_tap(context.handle, layer, True)

    def rows(self, layer: int, rows: Sequence[int]) -> HiddenStates:
        """float32[n, width]: after the first `layer` layers, for these rows of the context's last pass; a copy."""
        pointer = self._get(self._context.handle, layer)
        every = np.ctypeslib.as_array(pointer, shape=(self._context.rows, self.width))
        taken: HiddenStates = every[list(rows)]
        return taken


@cache
def _functions() -> tuple[Any, Any] | None:
    """The functions that switch a tap and that read it; None where the library lacks one."""
    library: Any = getattr(ll, "_lib", None)
    set_tap, get = (
        next((getattr(library, name) for name in names if hasattr(library, name)), None)
        for names in (SET_NAMES, GET_NAMES)
    )
    if set_tap is None or get is None:
        return None
    set_tap.argtypes, set_tap.restype = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_bool], None
    get.argtypes, get.restype = [ctypes.c_void_p, ctypes.c_uint32], ctypes.POINTER(ctypes.c_float)
    return set_tap, get
