"""Drafts with a model's own MTP layer, which reads the target's states after its last norm.

Knows where these states come from, and nothing of texts or passes, which are the base class's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.drafters.head_context import HeadContext, record_states, recorded_states
from specplug.engines.llama_cpp.drafters.head_drafter import HeadDrafter, HeadLimits
from specplug.engines.llama_cpp.drafters.head_text import Layout
from specplug.engines.llama_cpp.drafters.state_history import States


class MtpDrafter(HeadDrafter):
    """An MTP layer (multi-token prediction, or NextN), run again on its own states for further draft tokens.

    Source: DeepSeek-V3 (arXiv 2412.19437). State, requires and cost per step are those of HeadDrafter; a pass is one
    layer and the output matrix, or the rows of it that are kept.
    """

    def __init__(
        self, context: HeadContext, target: Context, ids: IntArray | None = None, **limits: Unpack[HeadLimits]
    ) -> None:
        """
        context  that of an MTP layer; passes of `target` record states from now on
        ids      int32[rows]: the tokens of the rows that the output matrix keeps; None where it has all
        """
        record_states(target)
        super().__init__(context, target, Layout(context.width, first=0), ids, **limits)

    def _target_states(self, rows: Sequence[int]) -> States:
        taken: States = recorded_states(self._target, self._target.rows, self._context.width)[list(rows)]
        return taken
