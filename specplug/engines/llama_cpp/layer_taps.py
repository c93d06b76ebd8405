"""The hidden states between the layers of the target, for every row of a pass.

llama.cpp has no public function for them; its library exports two under their C++ names. They abort the process where
an architecture does not record the inputs of its layers, so only those are served of which this is known.
Source: `llama_set_embeddings_layer_inp` (github.com/ggml-org/llama.cpp, src/llama-ext.h).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.exported import exported, missing
from specplug.engines.llama_cpp.model import Model

ARCHITECTURES = ("llama", "qwen3", "qwen35", "lfm2", "nemotron_h")
"""Architectures, by `general.architecture`, in which this was run (tests/test_early_exit.py, test_head_files.py)."""

SET_TAP, GET_TAP = "llama_set_embeddings_layer_inp", "llama_get_embeddings_layer_inp"

HiddenStates = npt.NDArray[np.float32]


def why_not(model: Model) -> str | None:
    """Why the hidden states of a model cannot be read; None where they can."""
    return why_not_of(model.meta("general.architecture"))


def why_not_of(architecture: str | None) -> str | None:
    """As `why_not`, by the name of an architecture."""
    if architecture not in ARCHITECTURES:
        return (
            f"llama.cpp is not known to record the inputs of the layers of architecture {architecture}, only of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return "this build of llama.cpp does not export the inputs of layers" if missing((SET_TAP, GET_TAP)) else None


class LayerTaps:
    """Records the input of some layers in every pass of a context: that of layer n is the output of the first n layers.

    State: in llama.cpp, float32[n_batch, width] per layer. Cost: a copy of so many numbers per row.
    """

    def __init__(self, context: Context, layers: Sequence[int]) -> None:
        """`layers` are at least 1 and below the number of layers of a model for which `why_not` is None.

        width  numbers of a hidden state
        """
        set_tap, get = exported(SET_TAP), exported(GET_TAP)
        assert set_tap is not None and get is not None
        self._get = get
        self._context = context
        self.width = context.model.width
        for layer in layers:
            set_tap(context.handle, layer, True)

    def rows(self, layer: int, rows: Sequence[int]) -> HiddenStates:
        """float32[n, width]: after the first `layer` layers, for these rows of the context's last pass; a copy."""
        context = self._context
        taken: HiddenStates = context.numbers(self._get(context.handle, layer), context.rows, self.width)[list(rows)]
        return taken
