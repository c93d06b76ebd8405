"""Finds the number of rows with logits for which a context's tensors are aligned to the cache lines of the processor.

llama.cpp places the inputs of a pass, among them the list of rows with logits, before all other tensors, at multiples
of 32 bytes. Depending on the sizes of the inputs, nearly all tensors start at a multiple of 64 bytes, or in the middle
of a cache line, where vectors of AVX-512 cross its end: then passes over several rows take up to 16% longer
(docs/lab-book/engine-settings.md). Eight more rows in the list (32 bytes) turn the one into the other.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as ll

from specplug.engines.llama_cpp.model import captured_log

CACHE_LINE = 64
"""Bytes of a cache line, and of the longest vector."""

ROWS = 8
"""Row numbers (int32) in half a cache line."""

TENSORS = 64
"""Tensors of a pass whose addresses are looked at: those of one or two layers."""


def aligned_rows(model: Any, params: Any, rows: int) -> int:
    """`rows`, or a few more, with which a context of these parameters has aligned tensors.

    model   llama.cpp's pointer to the model
    params  llama.cpp's parameters of the context

    Opens one or two contexts of the least size, in which a pass over one row begins: 5 to 40 ms for models of up to
    1.5B parameters. `rows` where neither number gives aligned tensors, or where that cannot be found out.
    """
    for number in (rows, rows + ROWS):
        addresses = _addresses(model, params, number)
        if 2 * sum(address % CACHE_LINE == 0 for address in addresses) > len(addresses):
            return number
    return rows


def _addresses(model: Any, params: Any, rows: int) -> list[int]:
    """The addresses of the first tensors of a pass; none where llama.cpp does not tell them."""
    address_of = getattr(ll._lib, "ggml_get_data", None)
    if address_of is None:
        return []
    address_of.restype, address_of.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    found: list[int | None] = []

    @ll.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
    def before_or_after(tensor: int, before: bool, _: int) -> bool:
        """Called for every tensor before it is computed; True asks for its result, and False after that ends a pass."""
        if before:
            found.append(address_of(tensor))
        return before and len(found) >= TENSORS

    small = type(params).from_buffer_copy(params)
    small.n_ctx = max(params.n_batch, 256)
    small.n_outputs_max = rows
    small.cb_eval = before_or_after
    token = (ctypes.c_int32 * 1)(0)  # the batch only points to it
    with captured_log():
        handle = ll.llama_init_from_model(model, small)
        if not handle:
            return []
        try:
            ll.llama_decode(handle, ll.llama_batch_get_one(token, 1))
        finally:
            ll.llama_free(handle)
    return [address for address in found if address is not None]
