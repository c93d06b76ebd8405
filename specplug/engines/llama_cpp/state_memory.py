"""Chooses how the memory of a model takes rejected rows back, before the context that needs it is opened.

A tiny context shows whether llama.cpp can keep snapshots of this architecture's states, and how large a state is.
Source: `llama_n_rs_seq`, which is 0 where it cannot, and the recurrent part of a sequence's state.
"""

from __future__ import annotations

from collections.abc import Callable

import llama_cpp.llama_cpp as ll

from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.rollback import AnyTail, Rollback
from specplug.engines.llama_cpp.state_cells import MOST_CHECKPOINTS
from specplug.engines.llama_cpp.state_rollback import Fork, Snapshots
from specplug.errors import UsageError
from specplug.machine.memory import available_memory
from specplug.profile import Profile, Runtime

MIB = 1 << 20

PROBE_CELLS = 256
"""Tokens of the context that is opened to look at a state."""


def state_bytes(model: Model, runtime: Runtime) -> tuple[int, bool]:
    """Bytes of one state of a recurrent or hybrid model, and whether llama.cpp keeps snapshots of it.

    It evaluates one token.
    """
    with open_context(model, runtime, cells=PROBE_CELLS, num_ids=1, max_rows=1, snapshots=1) as context:
        context.clear_batch()
        context.add(0, 0, (0,))
        context.decode()
        return len(context.recurrent_state(0)), bool(ll.llama_n_rs_seq(context.handle))


def rollback_for(
    model: Model, profile: Profile, *, slots: int, notify: Callable[[str], None] = lambda text: None
) -> Rollback:
    """The rollback for a model's memory, and for what a profile drafts.

    UsageError where the states do not fit into memory, or where the profile needs what such a memory cannot do.
    """
    if not model.has_recurrent_memory:
        return AnyTail()
    if profile.exact:
        raise UsageError(
            f"{model.path}: it keeps a recurrent state, for which specplug has no exact passes; drop exact (its "
            "answers are those of plain decoding up to rounding)"
        )
    runtime = profile.runtime
    depth = profile.planner.max_nodes if profile.speculates else 0
    size, can_snapshot = state_bytes(model, runtime)
    if depth and can_snapshot:
        affordable = runtime.snapshot_mib * MIB // (size * slots) - 1
        if 0 < affordable < depth:
            notify(
                f"{runtime.snapshot_mib} MiB hold snapshots for drafts of up to {affordable} tokens "
                f"({_mib(size)} for each token and sequence); raise runtime: snapshot_mib for longer ones"
            )
        depth = min(depth, max(affordable, 0))
    rollback: Rollback = Fork(slots) if profile.speculates and not (can_snapshot and depth) else Snapshots(depth)
    states = rollback.num_ids(slots, 0) * (1 + rollback.snapshots)
    free = available_memory().free
    if not runtime.gpu_layers and states * size > free:
        smaller = ", or a smaller runtime: snapshot_mib" if rollback.snapshots else ""
        raise UsageError(
            f"{model.path}: {states} recurrent states of {_mib(size)} do not fit into the {_mib(free)} that are free; "
            f"use fewer --slots{smaller}"
        )
    if isinstance(rollback, Fork) and can_snapshot:
        notify(
            f"{runtime.snapshot_mib} MiB hold no snapshot of {slots} states of {_mib(size)}: a draft with a wrong "
            "token costs a second pass, so only long sure drafts are tried; raise runtime: snapshot_mib, or use fewer "
            "--slots"
        )
    elif isinstance(rollback, Fork):
        notify(
            "this architecture's recurrent state cannot be taken back: a draft with a wrong token costs a second pass, "
            "so only long sure drafts are tried"
        )
    elif depth:
        kept = _mib(MOST_CHECKPOINTS * slots * size)
        notify(
            f"recurrent states of {_mib(states * size)} for drafts of up to {depth} tokens, and up to {kept} for "
            "checkpoints of prompts"
        )
    return rollback


def _mib(size: int) -> str:
    return f"{size / MIB:.3g} MiB"
