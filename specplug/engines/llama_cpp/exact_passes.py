"""The shapes of passes under `exact`: a row's logits do not depend on what else is in its pass.

Kernels are chosen by the number of rows, and round differently. The numbers of rows for which a model's kernels round
alike are measured when a context opens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from specplug.engines.llama_cpp.context import Context
from specplug.errors import UsageError
from specplug.profile import Profile, Runtime


@dataclass(frozen=True, slots=True)
class ExactPasses:
    """Every prompt is read from its beginning, in passes of its own. Other passes have at most `rows` rows.

    rows         the most rows for which passes round alike
    sequences    most sequences in one pass; their drafts share the other rows
    prompt_rows  rows of a prompt in one pass
    padded       whether a pass of one row gets a second one, since kernels for one row round differently
    """

    rows: int
    sequences: int
    prompt_rows: int
    padded: bool


def measure_exact_passes(
    context: Context, profile: Profile, *, slots: int, notify: Callable[[str], None]
) -> tuple[ExactPasses, Profile]:
    """The passes that round alike here, and the profile with drafts limited to them. The context is left empty.

    Raises UsageError where the profile drafts and no draft fits, or where several sequences would not be exact.
    """
    runtime = profile.runtime
    if slots > 1 and runtime.kv_type in ("f16", "f32"):
        # Flash attention sums these over blocks of cells, which begin at another position of every sequence.
        raise UsageError(
            f"profile {profile.name}: exact for several sequences needs runtime: {{kv_type: bf16}} or q8_0, "
            f"not {runtime.kv_type}"
        )
    max_nodes = profile.planner.max_nodes if profile.speculates else 0
    padded = _one_row_differs(context, runtime)
    rows = _rows_alike(context, 2 if padded else 1, max_nodes + slots)
    sequences = min(slots, max(1, rows // 2, rows - max_nodes))
    exact = ExactPasses(rows, sequences, runtime.batch, padded)
    if max_nodes <= rows - sequences:
        return exact, profile
    if rows < 2:
        raise UsageError(f"profile {profile.name}: exact: any draft changes rounding here; drop exact")
    max_nodes = rows - sequences
    notify(f"exact: passes of more than {rows} rows round differently here; drafts have {max_nodes} tokens at most")
    return exact, replace(profile, planner=replace(profile.planner, max_nodes=max_nodes))


def _one_row_differs(context: Context, runtime: Runtime) -> bool:
    """Whether a pass of one row rounds differently from a pass of two: measured for the weights, known for the cache.

    Some weight formats have kernels of their own for one row (f32 and bf16, but not q8_0 and q4_0, on x86); and for f16
    and f32 caches flash attention splits one row's sum over the threads from 512 cells on.
    """
    if runtime.kv_type in ("f16", "f32"):
        return True
    return _rows_alike(context, 1, 2) == 1


def _rows_alike(context: Context, first: int, last: int) -> int:
    """The largest n <= last for which passes of first, first + 1, ..., n rows give the first row the same logits."""
    tokens = np.random.default_rng(0).integers(0, context.model.num_tokens, 16 + last).astype(np.int32)
    context.read(tokens[:16])
    expected = None
    for rows in range(first, last + 1):
        context.clear_batch()
        context.add_span(tokens[16 : 16 + rows], 16, 0, wanted=True)
        context.decode()
        logits = np.array(context.logits(rows)[0])
        context.drop(0, 16)
        expected = logits if expected is None else expected
        if not np.array_equal(logits, expected):
            last = rows - 1
            break
    context.clear()
    return last
