"""The context of an MTP layer whose output matrix has some of its rows: in most models that matrix is the cost.

llama.cpp evaluates the layer without any logits, and the rows that are kept as a model of their own.
Source: VocabTrim (arXiv 2506.22694), here for a matrix that the layer shares with its model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Logits
from specplug.engines.llama_cpp.drafters.head_context import HeadContext
from specplug.engines.llama_cpp.drafters.states_head import StatesHead
from specplug.engines.llama_cpp.model import Model


class TrimmedHeadContext(HeadContext):
    """As HeadContext, for layers whose states are the input of the output matrix; logits have one number per kept row.

    Cost: a pass of the layer without its output matrix, and one of the kept rows.
    """

    def __init__(self, model: Model, handle: Any, head: StatesHead, *, num_ids: int, max_rows: int) -> None:
        """`head` is closed with the context."""
        super().__init__(model, handle, num_ids=num_ids, max_rows=max_rows, all_or_none=False, wanted_only=False)
        self._head = head
        architecture = model.meta("general.architecture")
        self._scale = float(model.meta(f"{architecture}.logit_scale") or 1.0)
        self._with_logits: list[int] = []

    def close(self) -> None:
        self._head.close()
        super().close()

    def use_threads(self, threads: int, threads_batch: int | None = None) -> None:
        super().use_threads(threads, threads_batch)
        self._head.use_threads(threads)

    def clear_batch(self) -> None:
        super().clear_batch()
        self._with_logits = []

    def add_span(
        self, tokens: IntArray | Sequence[int], position: int, seq_id: int, *, wanted: bool, last: bool = False
    ) -> None:
        first = self.rows
        super().add_span(tokens, position, seq_id, wanted=False)
        if wanted or last:
            self._with_logits += range(first if wanted else self.rows - 1, self.rows)

    def logits(self, rows: int) -> Logits:
        """float32[rows, kept rows]; a view until the next pass or call."""
        states = self.own_states()[self._with_logits]
        assert len(states) == rows
        logits = self._head.logits(states)
        # The states had their norm already, and another one without weights divides them by their size alone.
        logits *= self._scale * np.sqrt(np.square(states).mean(axis=1, keepdims=True) + self._head.epsilon)
        return logits
