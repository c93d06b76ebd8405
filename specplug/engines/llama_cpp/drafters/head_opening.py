"""Opens the heads that a profile names: the model that has them, a context, and what the target records for them.

Does not depend on how a head drafts. `head_finding.py` has checked the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as ll

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context, cache_bytes, context_params
from specplug.engines.llama_cpp.drafters.chain_drafter import SCORE_CONTEXT, SCORED_ROWS
from specplug.engines.llama_cpp.drafters.eagle_drafter import EagleDrafter
from specplug.engines.llama_cpp.drafters.head_context import CHOOSE_LAYER, HeadContext
from specplug.engines.llama_cpp.drafters.head_drafter import READ_WITH_ROOT, HeadDrafter
from specplug.engines.llama_cpp.drafters.head_finding import (
    TAPS,
    Head,
    loads_mtp,
    num_mtp_layers,
    target_layers,
    trimmed_output,
)
from specplug.engines.llama_cpp.drafters.mtp_drafter import MtpDrafter
from specplug.engines.llama_cpp.drafters.mtp_layers_drafter import MtpLayersDrafter
from specplug.engines.llama_cpp.drafters.slot_cells import cells_per_slot
from specplug.engines.llama_cpp.drafters.states_head import StatesHead
from specplug.engines.llama_cpp.drafters.trimmed_mtp import TrimmedHeadContext
from specplug.engines.llama_cpp.exported import exported
from specplug.engines.llama_cpp.memory_need import MemoryNeed, check_cache, memory_need, weight_bytes
from specplug.engines.llama_cpp.model import Model, captured_log, open_model
from specplug.errors import UsageError
from specplug.machine.memory import available_memory
from specplug.models.gguf_header import read_header
from specplug.models.model_facts import MTP_STATES_WITH_LOGITS
from specplug.profile import Runtime
from specplug.proposers.mtp import Mtp

STATE_BYTES = 2
"""Bytes of a number of a hidden state that is kept (state_history.py)."""


def open_head(
    source: Head,
    path: Path,
    target: Context,
    runtime: Runtime,
    *,
    slots: int,
    notify: Callable[[str], None] | None = None,
) -> tuple[HeadDrafter, Model | None]:
    """A head that drafts for `target`, and its model, to be closed after it; None where that is the target's.

    path  the result of `find_head`. Raises UsageError where llama.cpp cannot run it.
    """
    mtp, trimmed = isinstance(source, Mtp), trimmed_output(source, target.model.path)
    own = not (target.model.has_mtp and loads_mtp(source, target.model.path))
    model = (
        open_model(path, runtime, notify, mtp=mtp, head=not loads_mtp(source, target.model.path))
        if own
        else target.model
    )
    try:
        contexts = _open_contexts(source, path, trimmed, model, target, runtime, slots)
        settings: dict[str, Any] = {
            "slots": slots,
            "max_tokens": runtime.context,
            "max_draft": source.max_draft,
            "branches": source.branches,
            "end_tokens": target.model.end_tokens,
        }
        drafter: HeadDrafter
        ids = trimmed[1] if trimmed is not None else None
        if len(contexts) > 1:
            drafter = MtpLayersDrafter(contexts, target, ids, **settings)  # which closes the contexts, as others do
        elif mtp:
            drafter = MtpDrafter(contexts[0], target, ids, **settings)
        else:
            drafter = EagleDrafter(contexts[0], target, target_layers(path), **settings)
        try:
            drafter.warm_up()
        except BaseException:
            drafter.close()
            raise
    except BaseException:
        if own:
            model.close()
        raise
    return drafter, model if own else None


def _open_contexts(
    source: Head,
    path: Path,
    trimmed: tuple[Path, IntArray] | None,
    model: Model,
    target: Context,
    runtime: Runtime,
    slots: int,
) -> Sequence[HeadContext]:
    """The context of a head; of several MTP layers, one for each.

    trimmed  the result of `trimmed_output`
    """
    mtp = isinstance(source, Mtp)
    layers = num_mtp_layers(path) if mtp else 1
    if layers > 1:  # the later ones read the draft tokens before theirs together with the end of the text
        rows = slots * (source.max_draft + READ_WITH_ROOT + 1)
        runtime = replace(runtime, batch=max(runtime.batch, rows), ubatch=None)
    max_rows = max(slots if mtp else slots * READ_WITH_ROOT, SCORED_ROWS)
    with ExitStack() as stack:
        output = None
        if trimmed is not None:
            file, ids = trimmed
            output = StatesHead(file, runtime, width=target.model.width, num_ids=len(ids), max_rows=max_rows)
            stack.callback(output.close)
        contexts = [
            stack.enter_context(
                open_head_context(
                    model,
                    target,
                    runtime,
                    cells=head_cells(source, runtime.context, slots),
                    num_ids=slots + 1,
                    max_rows=max_rows,
                    mtp=mtp,
                    layer=layer,
                    output=output,
                )
            )
            for layer in range(layers)
        ]
        stack.pop_all()
    return contexts


def open_head_context(
    model: Model,
    target: Context,
    runtime: Runtime,
    *,
    cells: int,
    num_ids: int,
    max_rows: int,
    mtp: bool,
    layer: int = 0,
    output: StatesHead | None = None,
) -> HeadContext:
    """Open a context for a head. Raises UsageError when llama.cpp rejects it, as it does without an MTP layer.

    target    whose embeddings a head without its own takes
    cells     KV cells in all, shared by all sequences
    num_ids   sequence ids
    max_rows  the most rows with logits in one pass
    mtp       whether the head is an MTP layer of `model`; else `model` is a head as a whole
    layer     of several MTP layers, which one; only those of architectures in SEVERAL_MTP_LAYERS can be chosen
    output    the rows of the output matrix that an MTP layer keeps
    """
    if not runtime.gpu_layers:
        needed = cache_bytes(model, runtime, cells)
        if mtp:  # whose context has cells for all MTP layers, which are among those that the file counts
            count = int(ll.llama_model_n_layer_nextn(model.handle))
            needed = needed * count // max(1, model.num_layers + count)
        check_cache(needed, cells, runtime.kv_type, available_memory())
    params = context_params(model, runtime, cells=cells, num_ids=num_ids, max_rows=max_rows)
    params.ctx_type = ll.LLAMA_CONTEXT_TYPE_MTP if mtp else ll.LLAMA_CONTEXT_TYPE_DEFAULT
    params.ctx_other = target.handle
    with captured_log() as log:
        handle = ll.llama_init_from_model(model.handle, params)
    if not handle:
        kind = "MTP layer" if mtp else "EAGLE-3 head"
        raise UsageError(f"{model.path}: llama.cpp cannot run its {kind}: {log.reason()}")
    if layer:
        choose = exported(CHOOSE_LAYER)
        assert choose is not None
        choose(handle, layer)
    if output is not None:
        return TrimmedHeadContext(model, handle, output, num_ids=num_ids, max_rows=max_rows)
    wanted_only = mtp and model.meta("general.architecture") in MTP_STATES_WITH_LOGITS
    return HeadContext(model, handle, num_ids=num_ids, max_rows=max_rows, all_or_none=not mtp, wanted_only=wanted_only)


def head_need(source: Head, path: Path, target: Path, runtime: Runtime, context: int) -> MemoryNeed:
    """What a head takes, with the states of the target that it keeps; `context` is 0 where it is not known."""
    cells = head_cells(source, context, 1) if context else 0
    need, header = memory_need(path, runtime, cells), read_header(path)
    width = header.numbers.get("embedding_length", 0)
    states = context * STATE_BYTES * (width if isinstance(width, int) else 0) * (1 if isinstance(source, Mtp) else TAPS)
    # Each of several MTP layers has a context with cells for all of them. They are among the layers that a file counts.
    layers = num_mtp_layers(path) if isinstance(source, Mtp) else 1
    trimmed = trimmed_output(source, target)
    output = weight_bytes(trimmed[0]) if trimmed is not None else 0
    cache = need.cache * layers**2 // max(1, header.num_layers)
    own = 0 if loads_mtp(source, target) else need.weights
    return replace(need, weights=own + output, cache=cache + states)


def head_cells(source: Head, max_tokens: int, slots: int) -> int:
    """KV cells of a head for `slots` sequences of up to `max_tokens` tokens."""
    cells = slots * cells_per_slot(max_tokens, source.max_draft, None) + SCORE_CONTEXT + SCORED_ROWS
    return -(-cells // 256) * 256
