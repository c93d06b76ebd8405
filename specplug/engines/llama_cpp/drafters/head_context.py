"""The context of a head: every row is a token together with a hidden state, and gives logits and a state of its own.

Knows batches, positions and sequence ids. Knows neither the target nor texts.
Source: the context of MTP layers, and the graphs of `eagle3`, in llama.cpp (src/models/).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp.llama_cpp as ll
import numpy as np

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.drafters.state_history import States
from specplug.engines.llama_cpp.exported import exported, missing
from specplug.engines.llama_cpp.model import Model
from specplug.errors import SpecplugError

SET_STATES, GET_STATES = "llama_set_embeddings_nextn", "llama_get_embeddings_nextn"
CHOOSE_LAYER = "llama_set_nextn_layer_offset"

_FLOATS = ctypes.POINTER(ctypes.c_float)


def why_no_states() -> str | None:
    """Why hidden states cannot be read in this build of llama.cpp; None where they can."""
    lacking = missing((SET_STATES, GET_STATES))
    return f"this build of llama.cpp does not export {lacking[0]}" if lacking else None


def why_no_layers() -> str | None:
    """Why only the first of several MTP layers can be run in this build of llama.cpp; None where all can."""
    return f"this build of llama.cpp does not export {CHOOSE_LAYER}" if missing((CHOOSE_LAYER,)) else None


def record_states(context: Context, *, wanted_only: bool = False) -> None:
    """Have every pass of a context record the states after its last norm, for all of its rows.

    wanted_only  for those with logits, as the MTP layers of MTP_STATES_WITH_LOGITS require
    """
    function = exported(SET_STATES)
    assert function is not None
    function(context.handle, True, wanted_only)


def recorded_states(context: Context, rows: int, width: int) -> States:
    """The states of the last pass, in the order of its batch; a view until the next pass."""
    function = exported(GET_STATES)
    assert function is not None
    pointer = function(context.handle)
    if not pointer:
        raise SpecplugError("llama.cpp has recorded no hidden states in the last pass")
    return context.numbers(pointer, rows, width)


class HeadContext(Context):
    """As `Context`, where a row has a hidden state beside its token: zeros, where none is given.

    width  numbers of a state that a row is given, and of the one that it gives
    """

    def __init__(
        self, model: Model, handle: Any, *, num_ids: int, max_rows: int, all_or_none: bool, wanted_only: bool
    ) -> None:
        """
        all_or_none  whether logits are right only where all rows of a pass get them, as those of EAGLE-3 are
        wanted_only  whether only the rows with logits give states
        """
        super().__init__(model, handle, num_ids=num_ids, max_rows=max_rows)
        self.width = int(ll.llama_model_n_embd_out(model.handle))
        self.all_or_none = all_or_none
        self.wanted_only = wanted_only
        self.max_rows = max_rows
        self.num_batch = min(self.num_batch, int(ll.llama_n_ubatch(handle)))  # so that a pass is never divided
        self._states = np.zeros((self.num_batch, self.width), dtype=np.float32)
        self._batch.embd = self._states.ctypes.data_as(_FLOATS)
        self._encoder: Any = None
        record_states(self, wanted_only=wanted_only)

    def close(self) -> None:
        if self._encoder is not None:
            ll.llama_batch_ext_free(self._encoder)
            self._encoder = None
        super().close()

    def add_states(
        self,
        tokens: Sequence[int] | IntArray,
        states: States,
        position: int,
        seq_id: int,
        *,
        wanted: bool = False,
        last: bool = False,
    ) -> None:
        """As `add_span`, with the states of the rows; `last` gives logits to all of them where it is all or none."""
        start = self.rows
        self.add_span(tokens, position, seq_id, wanted=wanted or (last and self.all_or_none), last=last)
        self._states[start : self.rows] = states

    def _set_inputs(self, tokens: IntArray | Sequence[int], start: int, stop: int) -> None:
        super()._set_inputs(tokens, start, stop)
        self._states[start:stop] = 0.0

    def own_states(self) -> States:
        """The states that the rows of the last pass give, by `wanted_only` those with logits; a view until the next
        pass, whose end it waits for."""
        rows = int(self._wanted[: self.rows].sum()) if self.wanted_only else self.rows
        return recorded_states(self, rows, self.width)

    def encode(self, inputs: States, seq_id: int) -> States:
        """float32[n, width]: the states that an EAGLE-3 head makes of `inputs`, at most `num_batch` rows.

        seq_id  an id that loses its cells, such as those of an interrupted pass: the encoder stores none, and yet its
                positions would have to follow them
        """
        self.drop(seq_id)
        assert len(inputs) <= self.num_batch, "llama.cpp would abort"
        if self._encoder is None:
            self._encoder = ll.llama_batch_ext_init(self.handle)
        batch, rows = self._encoder, np.ascontiguousarray(inputs, dtype=np.float32)
        ll.llama_batch_ext_clear(batch)
        for place in range(len(rows)):
            row = ll.llama_embd(rows[place].ctypes.data_as(_FLOATS), 1, rows.shape[1])
            index = ll.llama_batch_ext_add_embd(batch, seq_id, row)
            if index < 0:
                raise SpecplugError(f"llama.cpp refuses a row of the EAGLE-3 encoder (code {index})")
            ll.llama_batch_ext_set_pos(batch, index, (ctypes.c_int32 * 4)(place, place, place, place))
            ll.llama_batch_ext_set_output_embd(batch, index, True)
        code = ll.llama_process(self.handle, ll.LLAMA_PROCESS_TYPE_ENCODE, batch)
        if code:
            raise SpecplugError(f"llama.cpp's EAGLE-3 encoder failed on {len(rows)} rows (code {code})")
        return recorded_states(self, len(rows), self.width).copy()
