"""Drafts with an EAGLE-3 head, which reads the inputs of some layers of the target.

Knows where these come from, and what the head's encoder makes of them. Knows nothing of texts or passes, which are the
base class's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np

from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.drafters.head_context import HeadContext
from specplug.engines.llama_cpp.drafters.head_drafter import HeadDrafter, HeadLimits
from specplug.engines.llama_cpp.drafters.head_text import Layout
from specplug.engines.llama_cpp.drafters.state_history import States
from specplug.engines.llama_cpp.layer_taps import LayerTaps


class EagleDrafter(HeadDrafter):
    """An EAGLE-3 head in a file of its own.

    Source: EAGLE-3 (arXiv 2503.01840). State, requires and cost per step are those of HeadDrafter; a pass is one layer
    and the head's output matrix, and each kept token costs a row of the encoder, one matrix, too.
    """

    def __init__(
        self,
        context: HeadContext,
        target: Context,
        layers: Sequence[int],
        **limits: Unpack[HeadLimits],
    ) -> None:
        """
        context  that of the head
        target   whose passes record the inputs of `layers` from now on
        layers   in the order in which the head reads them; each below the target's number of layers
        """
        self._layers = tuple(layers)
        self._taps = LayerTaps(target, layers)
        super().__init__(context, target, Layout(len(layers) * self._taps.width, first=1), **limits)

    def _target_states(self, rows: Sequence[int]) -> States:
        return np.concatenate([self._taps.rows(layer, rows) for layer in self._layers], axis=1)

    def _inputs(self, states: States) -> States:
        context = self._context
        starts = range(0, len(states), context.num_batch)
        return np.concatenate([context.encode(states[at : at + context.num_batch], self._spare_id) for at in starts])
