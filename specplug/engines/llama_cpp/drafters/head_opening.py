"""Opens the heads that a profile names: the model that has them, a context, and what the target records for them.

Does not depend on how a head drafts. `head_finding.py` has checked the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.drafters.chain_drafter import SCORE_CONTEXT, SCORED_ROWS
from specplug.engines.llama_cpp.drafters.eagle_drafter import EagleDrafter
from specplug.engines.llama_cpp.drafters.head_context import HeadContext, open_head_context
from specplug.engines.llama_cpp.drafters.head_drafter import READ_WITH_ROOT, HeadDrafter
from specplug.engines.llama_cpp.drafters.head_finding import TAPS, Head, loads_mtp, num_mtp_layers, target_layers
from specplug.engines.llama_cpp.drafters.mtp_drafter import MtpDrafter
from specplug.engines.llama_cpp.drafters.mtp_layers_drafter import MtpLayersDrafter
from specplug.engines.llama_cpp.drafters.slot_cells import cells_per_slot
from specplug.engines.llama_cpp.memory_need import MemoryNeed, memory_need
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.models.gguf_header import read_header
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
    mtp = isinstance(source, Mtp)
    own = not (target.model.has_mtp and loads_mtp(source, target.model.path))
    model = (
        open_model(path, runtime, notify, mtp=mtp, head=not loads_mtp(source, target.model.path))
        if own
        else target.model
    )
    try:
        contexts = _open_contexts(source, path, model, target, runtime, slots)
        settings: dict[str, Any] = {
            "slots": slots,
            "max_tokens": runtime.context,
            "max_draft": source.max_draft,
            "branches": source.branches,
            "end_tokens": target.model.end_tokens,
        }
        drafter: HeadDrafter
        if len(contexts) > 1:
            drafter = MtpLayersDrafter(contexts, target, **settings)  # which closes the contexts, as the others do
        elif mtp:
            drafter = MtpDrafter(contexts[0], target, **settings)
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
    source: Head, path: Path, model: Model, target: Context, runtime: Runtime, slots: int
) -> Sequence[HeadContext]:
    """The context of a head; of several MTP layers, one for each."""
    mtp = isinstance(source, Mtp)
    layers = num_mtp_layers(path) if mtp else 1
    if layers > 1:  # the later ones read the draft tokens before theirs together with the end of the text
        rows = slots * (source.max_draft + READ_WITH_ROOT + 1)
        runtime = replace(runtime, batch=max(runtime.batch, rows), ubatch=None)
    with ExitStack() as stack:
        contexts = [
            stack.enter_context(
                open_head_context(
                    model,
                    target,
                    runtime,
                    cells=head_cells(source, runtime.context, slots),
                    num_ids=slots + 1,
                    max_rows=max(slots if mtp else slots * READ_WITH_ROOT, SCORED_ROWS),
                    mtp=mtp,
                    layer=layer,
                )
            )
            for layer in range(layers)
        ]
        stack.pop_all()
    return contexts


def head_need(source: Head, path: Path, target: Path, runtime: Runtime, context: int) -> MemoryNeed:
    """What a head takes, with the states of the target that it keeps; `context` is 0 where it is not known."""
    cells = head_cells(source, context, 1) if context else 0
    need, header = memory_need(path, runtime, cells), read_header(path)
    width = header.numbers.get("embedding_length", 0)
    states = context * STATE_BYTES * (width if isinstance(width, int) else 0) * (1 if isinstance(source, Mtp) else TAPS)
    # Each of several MTP layers has a context with cells for all of them. They are among the layers that a file counts.
    layers = num_mtp_layers(path) if isinstance(source, Mtp) else 1
    cache = need.cache * layers**2 // max(1, header.num_layers)
    return replace(need, weights=0 if loads_mtp(source, target) else need.weights, cache=cache + states)


def head_cells(source: Head, max_tokens: int, slots: int) -> int:
    """KV cells of a head for `slots` sequences of up to `max_tokens` tokens."""
    cells = slots * cells_per_slot(max_tokens, source.max_draft, None) + SCORE_CONTEXT + SCORED_ROWS
    return -(-cells // 256) * 256
