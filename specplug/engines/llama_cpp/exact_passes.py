"""The shapes of passes under `exact`: a row's logits do not depend on what else is in its pass.

Kernels are chosen by the number of rows, and round differently. The numbers of rows for which a model's kernels round
alike are measured when a context opens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from specplug.engines.llama_cpp.cache_fill import hashed_tokens
from specplug.engines.llama_cpp.context import Context, Logits
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
    rows = _alike(context, 2 if padded else 1, max_nodes + slots)
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
    return _alike(context, 1, 2) == 1


def _alike(context: Context, base: int, most: int) -> int:
    """`rows_that_agree` for every row count up to `most`, on a short text. The context is left empty."""
    if most <= base:
        return base
    context.read(hashed_tokens(0, 16, context.model.num_tokens))
    rows = rows_that_agree(context, 16, range(base + 1, most + 1), base)
    context.clear()
    return rows


def rows_that_agree(context: Context, filled: int, checked: Sequence[int], base: int = 1) -> int:
    """The most rows for which passes give each of their rows the logits that passes of `base` rows give it.

    The cache holds `filled` tokens of sequence 0, and is left so. All rows of a pass are compared: a small difference
    often vanishes where the activations are quantised, so that a single row shows too little.

    checked  row counts above `base`, ascending; the result is at most the last of them. Where one of them differs, the
             row counts between it and the one before are tried, too
    """
    tokens = hashed_tokens(filled, filled + checked[-1] + base, context.model.num_tokens)

    def logits(rows: int, per_pass: int) -> Logits:
        """float32[rows, V]: the logits of the next `rows` tokens, read in passes of `per_pass` rows each."""
        found = []
        with context.tried(0, filled, 1) as branch:
            for at in range(0, rows, per_pass):
                part = tokens[at : at + per_pass]
                context.clear_batch()
                context.add_span(part, filled + at, branch, wanted=True)
                context.decode()
                found.append(np.array(context.logits(len(part))))
        return np.concatenate(found)[:rows]

    few = checked[: min(2, len(checked))]
    if not np.array_equal(logits(few[-1], base), logits(few[-1], few[-1])):
        checked = few  # no need to read the text of the larger passes row by row
    expected = logits(checked[-1], base)
    agreed = base
    for rows in checked:
        if not np.array_equal(expected[:rows], logits(rows, rows)):
            between = range(agreed + 1, rows)
            return next((n - 1 for n in between if not np.array_equal(expected[:n], logits(n, n))), rows - 1)
        agreed = rows
    return agreed
