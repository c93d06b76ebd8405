"""Times passes of a drafter while it drafts nothing.

Works on a context and sequence ids, and leaves no cell behind. Does not depend on texts or drafts.
"""

from __future__ import annotations

from time import perf_counter_ns

import numpy as np

from specplug.engines.llama_cpp.cache_fill import CacheFill
from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.drafters.chain import probability_of


class PassTiming:
    """Times passes over arbitrary tokens. `spare_id` is a sequence id that is empty between the calls."""

    def __init__(self, context: Context, slots: int, spare_id: int) -> None:
        self._context = context
        self._slots = slots
        self._spare_id = spare_id

    def typical(self, tokens: int, count: int) -> tuple[float, float]:
        """Milliseconds of drafting one token after so many, and of one for each of the slots, on an empty context.

        The lower quartiles of `count` passes: disturbances make passes longer, and a cost that is too high is corrected
        late.
        """
        CacheFill(self._context).extend(0, 0, tokens)
        one = float(np.quantile([self.one_row_ms(0, tokens) for _ in range(count)], 0.25))
        if self._slots == 1:
            self._context.drop(0)
            return one, one
        # Rows of all slots attend to no less than one row does.
        several = [self.all_rows_ms() for _ in range(count)]
        return one, max(one, float(np.quantile(several, 0.25)))

    def one_row_ms(self, slot: int, position: int) -> float:
        """Milliseconds of drafting one token after the cells of a slot, which ends before `position`."""
        context = self._context
        context.drop(self._spare_id)  # what an interrupted pass may have left
        if position:
            context.copy(slot, self._spare_id)
        return self._pass_ms([(self._spare_id, position)])

    def all_rows_ms(self) -> float:
        """Milliseconds of drafting one token for each of the slots, which are empty."""
        for slot in range(self._slots):
            self._context.drop(slot)
        return self._pass_ms([(slot, 0) for slot in range(self._slots)])

    def read_ms(self, tokens: int) -> float:
        """Milliseconds of reading so many tokens."""
        began = perf_counter_ns()
        self._context.clear_batch()
        self._context.add_span([0] * tokens, 0, self._spare_id, wanted=False, last=True)
        self._context.decode()
        ms = (perf_counter_ns() - began) / 1e6
        self._context.drop(self._spare_id)
        return ms

    def _pass_ms(self, rows: list[tuple[int, int]]) -> float:
        """Milliseconds of a pass with one row for each sequence id and position, with what is done with its logits."""
        context = self._context
        began = perf_counter_ns()
        context.clear_batch()
        for seq_id, position in rows:
            context.add_span([0], position, seq_id, wanted=True)
        context.decode()
        for row in context.logits(len(rows)):
            probability_of(row, int(row.argmax()))
        ms = (perf_counter_ns() - began) / 1e6
        for seq_id, _ in rows:
            context.drop(seq_id)
        return ms
