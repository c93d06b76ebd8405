"""One llama.cpp context: the batch of a pass, the KV cache, and the logits of the last pass.

Works on rows, positions and sequence ids, and does not depend on drafts or sampling.
State: batch arrays of n_batch rows; a view of the logits inside llama.cpp, float32[max_rows, vocabulary] at most.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, Self

import llama_cpp.llama_cpp as ll
import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.engines.llama_cpp.alignment import aligned_rows
from specplug.engines.llama_cpp.memory_need import DEFAULT_KV_TYPE, KV_BYTES, Number, check_cache, numbers_per_cell
from specplug.engines.llama_cpp.model import Model, captured_log
from specplug.errors import SpecplugError, UsageError
from specplug.machine.memory import available_memory
from specplug.profile import Runtime

KV_TYPES = {"f32": ll.GGML_TYPE_F32, "f16": ll.GGML_TYPE_F16, "bf16": 30, "q8_0": ll.GGML_TYPE_Q8_0}
"""The type numbers of ggml; llama-cpp-python has no name for bf16."""

Logits = npt.NDArray[np.float32]

MAX_SEQUENCE_IDS = 256
"""The limit of llama.cpp on sequence ids per context."""


class Inputs(Protocol):
    """The input embeddings of a model whose own embedding table lacks some of the tokens."""

    width: int

    def rows(self, tokens: IntArray | Sequence[int]) -> npt.NDArray[np.float32]:
        """float32[n, width]: the embeddings of `tokens`."""


def open_context(
    model: Model,
    runtime: Runtime,
    *,
    cells: int,
    num_ids: int,
    max_rows: int,
    snapshots: int = 0,
    inputs: Inputs | None = None,
) -> Context:
    """Open a context for `model`. Raises UsageError when llama.cpp rejects the parameters.

    cells    KV cells in all, shared by all sequences
    num_ids  sequence ids, those of slots and of tree leaves together; at most 256
    max_rows the most rows with logits in one pass
    snapshots
             states before the last rows of a pass that are kept for each sequence id, where the model can do so
    inputs   the embeddings of tokens, where the model cannot embed all of them itself
    """
    if not runtime.gpu_layers:
        check_cache(cache_bytes(model, runtime, cells), cells, runtime.kv_type, available_memory())
    params = context_params(model, runtime, cells=cells, num_ids=num_ids, max_rows=max_rows)
    if model.has_recurrent_memory:
        set_state_params(params, snapshots)
    if not runtime.gpu_layers:
        params.n_outputs_max = aligned_rows(model.handle, params, params.n_outputs_max)
    with captured_log() as log:
        handle = ll.llama_init_from_model(model.handle, params)
    if not handle:
        raise UsageError(f"{model.path}: llama.cpp cannot open a context of {cells} tokens: {log.reason()}")
    return Context(model, handle, num_ids=num_ids, max_rows=max_rows, inputs=inputs)


def context_params(model: Model, runtime: Runtime, *, cells: int, num_ids: int, max_rows: int) -> Any:
    """llama.cpp's parameters of a context, as in `open_context`."""
    assert runtime.flash_attention is not None, "the profile was not resolved"
    flash_attention = runtime.flash_attention and model.way.flash_attention
    if runtime.kv_type == "q8_0" and not flash_attention:
        raise UsageError("a q8_0 KV cache needs flash attention; set runtime: {flash_attention: true}")
    params = ll.llama_context_default_params()
    params.n_ctx = cells
    params.n_batch = min(max(runtime.batch, max_rows), cells)
    params.n_ubatch = min(max(runtime.ubatch or runtime.batch, max_rows), cells)
    params.n_threads, params.n_threads_batch = runtime.threads, runtime.threads_batch or runtime.threads
    params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = KV_TYPES[runtime.kv_type or DEFAULT_KV_TYPE]
    params.no_perf = True
    set_tree_params(params, num_ids, max_rows)
    return params


def cache_bytes(model: Model, runtime: Runtime, cells: int) -> int:
    """Bytes that a KV cache of so many cells takes, as if every layer attended to all of it; 0 where unknown."""
    name = model.meta("general.architecture")

    def read(key: str) -> Number:
        text = model.meta(f"{name}.{key}") or ""
        if text.startswith("["):
            return tuple(int(one) for one in text.strip("[]").split(",") if one.strip().isdecimal())
        return int(text) if text.isdecimal() else None

    return int(cells * numbers_per_cell(read) * KV_BYTES[runtime.kv_type or DEFAULT_KV_TYPE])


def set_tree_params(params: Any, num_ids: int, max_rows: int) -> None:
    """Set the parameters that trees require: sequence ids that share cells, and at most `max_rows` rows with logits."""
    params.n_seq_max = num_ids
    params.n_outputs_max = max(max_rows, num_ids)
    params.kv_unified = True


def set_state_params(params: Any, snapshots: int) -> None:
    """Set the parameters that a recurrent state requires: llama.cpp evaluates every batch at once.

    It loses snapshots where it divides a batch, and aborts where it could not hold the rows that they are made of.
    """
    params.n_rs_seq = snapshots
    params.n_batch = params.n_ubatch = max(min(params.n_ubatch or params.n_batch, params.n_batch), snapshots + 2)


class Context:
    """A KV cache of `cells` tokens shared by `num_ids` sequence ids, and one reusable batch.

    Rows are added with `add` or `add_span`, then `decode` evaluates them in one pass.
    """

    def __init__(self, model: Model, handle: Any, *, num_ids: int, max_rows: int, inputs: Inputs | None = None) -> None:
        """`handle` is llama.cpp's pointer to a context that was opened with `set_tree_params`."""
        self.model = model
        self.handle = handle
        self.memory = ll.llama_get_memory(handle)
        self.cells: int = ll.llama_n_ctx(handle)
        self.num_batch: int = ll.llama_n_batch(handle)
        self.num_ids = num_ids
        self.max_rows = max_rows
        n = self.num_batch
        self._tokens = np.zeros(n, dtype=np.int32)
        self._positions = np.zeros(n, dtype=np.int32)
        self._num_ids = np.ones(n, dtype=np.int32)
        self._wanted = np.zeros(n, dtype=np.int8)
        self._single_ids = np.zeros((n, 1), dtype=np.int32)
        self._many_ids = np.zeros((max_rows, num_ids), dtype=np.int32)
        self._id_pointers = np.zeros(n, dtype=np.uintp)
        self._single_pointers = (self._single_ids.ctypes.data + 4 * np.arange(n)).astype(np.uintp)
        self._many_pointers = [self._many_ids.ctypes.data + 4 * num_ids * row for row in range(max_rows)]
        self._inputs = inputs
        self._embeddings = np.zeros((n if inputs else 0, inputs.width if inputs else 0), dtype=np.float32)
        self._batch = ll.llama_batch(
            0,
            None if inputs else self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            self._embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) if inputs else None,
            self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            self._num_ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            self._id_pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self.rows = 0
        self._views: dict[tuple[int | None, int, int], Logits] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self.handle:
            with captured_log():
                ll.llama_free(self.handle)
            self.handle = None

    def use_threads(self, threads: int, threads_batch: int | None = None) -> None:
        """Set the threads that compute passes from now on; `threads_batch` those of passes over several rows."""
        ll.llama_set_n_threads(self.handle, threads, threads_batch or threads)

    # -- the batch ------------------------------------------------------------------------------------------------

    def clear_batch(self) -> None:
        self.rows = 0

    def add_span(
        self, tokens: IntArray | Sequence[int], position: int, seq_id: int, *, wanted: bool, last: bool = False
    ) -> None:
        """Add rows for consecutive positions of one sequence.

        wanted  all rows get logits
        last    the last row gets logits
        """
        start, stop = self.rows, self.rows + len(tokens)
        self._set_inputs(tokens, start, stop)
        self._positions[start:stop] = np.arange(position, position + stop - start, dtype=np.int32)
        self._num_ids[start:stop] = 1
        self._single_ids[start:stop, 0] = seq_id
        self._id_pointers[start:stop] = self._single_pointers[start:stop]
        self._wanted[start:stop] = wanted
        if last:
            self._wanted[stop - 1] = 1
        self.rows = stop

    def add(self, token: int, position: int, seq_ids: Sequence[int]) -> None:
        """Add one row with logits that belongs to several sequence ids: a tree node with the ids of its leaves."""
        row = self.rows
        count = len(seq_ids)
        self._set_inputs((token,), row, row + 1)
        self._positions[row] = position
        self._num_ids[row] = count
        self._wanted[row] = 1
        if count == 1:
            self._single_ids[row, 0] = seq_ids[0]
            self._id_pointers[row] = self._single_pointers[row]
        else:
            self._many_ids[row, :count] = seq_ids
            self._id_pointers[row] = self._many_pointers[row]
        self.rows = row + 1

    def _set_inputs(self, tokens: IntArray | Sequence[int], start: int, stop: int) -> None:
        if self._inputs is None:
            self._tokens[start:stop] = tokens
        else:
            self._embeddings[start:stop] = self._inputs.rows(tokens)

    def decode(self) -> None:
        """Evaluate the batch in one pass. Raises SpecplugError when llama.cpp fails."""
        self._batch.n_tokens = self.rows
        code = ll.llama_decode(self.handle, self._batch)
        if code != 0:
            self._fail(code)

    def encode_texts(self) -> None:
        """As `decode`, for a model without a KV cache, which reads complete texts only."""
        self._batch.n_tokens = self.rows
        code = ll.llama_encode(self.handle, self._batch)
        if code != 0:
            self._fail(code)

    def read(self, text: IntArray) -> Logits:
        """Empty the cache, evaluate a text (int32[n], n >= 1) as sequence 0; float32[1, V], the logits after it."""
        self.clear()
        for at in range(0, len(text), self.num_batch):
            self.clear_batch()
            self.add_span(text[at : at + self.num_batch], at, 0, wanted=False, last=True)
            self.decode()
        return self.logits(1)

    def logits(self, rows: int) -> Logits:
        """float32[rows, V]: the logits of the last pass, rows with logits only, in batch order; a view, not a copy."""
        return self.numbers(ll.llama_get_logits(self.handle), rows, self.model.num_tokens)

    def numbers(self, pointer: Any, rows: int, width: int) -> npt.NDArray[np.float32]:
        """float32[rows, width]: what a `float *` of this context points to; a view that is made once per address."""
        key = (ctypes.cast(pointer, ctypes.c_void_p).value, rows, width)
        view = self._views.get(key)
        if view is None:
            if len(self._views) > 256:
                self._views.clear()
            view = self._views[key] = np.ctypeslib.as_array(pointer, shape=(rows, width))
        return view

    # -- the KV cache ---------------------------------------------------------------------------------------------

    def drop(self, seq_id: int, start: int = -1, stop: int = -1) -> None:
        """Remove `seq_id` from the cells at positions [start, stop), by default from all."""
        if not ll.llama_memory_seq_rm(self.memory, seq_id, start, stop):
            raise SpecplugError(f"llama.cpp cannot drop sequence {seq_id} from position {start} on")

    def copy(self, source: int, target: int, start: int = -1, stop: int = -1) -> None:
        """Share the cells of `source` at positions [start, stop) with `target`; no keys or values are copied."""
        ll.llama_memory_seq_cp(self.memory, source, target, start, stop)

    @contextmanager
    def tried(self, seq_id: int, length: int, copy: int) -> Iterator[int]:
        """The sequence id on which rows after the first `length` tokens of `seq_id` can be tried; they are then gone.

        copy  an empty sequence id, which is used where a recurrent state cannot be cut
        """
        if self.model.has_recurrent_memory:
            self.copy(seq_id, copy)
            yield copy
            self.drop(copy)
        else:
            yield seq_id
            self.drop(seq_id, length)

    def state(self, seq_id: int) -> bytes:
        """A sequence's cached keys and values, for `restore` on a context of the same model, KV type and attention."""
        size = ll.llama_state_seq_get_size(self.handle, seq_id)
        buffer = (ctypes.c_uint8 * size)()
        written = ll.llama_state_seq_get_data(self.handle, buffer, size, seq_id)
        return bytes(buffer)[:written]

    def state_of(self, seq_id: int, spans: Sequence[tuple[int, int]], spare: int) -> bytes:
        """As `state`, of the cells at the positions [start, stop) of `spans`, which the attention of a model allows.

        spare  a sequence id without cells; it has none afterwards
        """
        try:
            for start, stop in spans:
                self.copy(seq_id, spare, start, stop)
            return self.state(spare)
        finally:
            self.drop(spare)

    def restore(self, seq_id: int, state: bytes) -> None:
        """Load what `state` returned into an empty sequence. Raises SpecplugError when it does not fit."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not ll.llama_state_seq_set_data(self.handle, buffer, len(state), seq_id):
            raise SpecplugError(f"llama.cpp cannot load the state of sequence {seq_id}: the contexts differ")

    def recurrent_state(self, seq_id: int) -> bytes:
        """As `state`, without what grows with the text: what recurrent layers keep of a sequence."""
        flags = ll.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = ll.llama_state_seq_get_size_ext(self.handle, seq_id, flags)
        buffer = (ctypes.c_uint8 * size)()
        written = ll.llama_state_seq_get_data_ext(self.handle, buffer, size, seq_id, flags)
        return bytes(buffer)[:written]

    def return_to(self, seq_id: int, length: int, state: bytes) -> None:
        """Cut a sequence to its first `length` tokens, after which `recurrent_state` returned `state`."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        flags = ll.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        if not ll.llama_state_seq_set_data_ext(self.handle, buffer, len(state), seq_id, flags):
            raise SpecplugError(f"llama.cpp cannot load the state of sequence {seq_id}: the contexts differ")
        self.drop(seq_id, length)  # what attention keeps of the tokens after it

    def clear(self) -> None:
        """Drop all cells; the next pass fills them from the first one on."""
        ll.llama_memory_clear(self.memory, False)

    def _fail(self, code: int) -> NoReturn:
        if code == 1:
            raise SpecplugError(
                f"the KV cache of {self.cells} tokens is full; raise runtime: context, or run fewer sequences"
            )
        raise SpecplugError(f"llama.cpp failed to evaluate {self.rows} rows (code {code})")
