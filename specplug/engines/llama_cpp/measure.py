"""Measures T(rows, context), the time of a model's passes on this machine.

Times passes of llama.cpp, and does not depend on drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from time import perf_counter

import numpy as np

from specplug.core import IntArray
from specplug.engines.llama_cpp.cache_fill import CacheFill, hashed_tokens
from specplug.engines.llama_cpp.context import Context, open_context
from specplug.engines.llama_cpp.model import Model
from specplug.machine import fingerprint
from specplug.profile import CostPoints, Profile, Runtime

QUICK_SECONDS = 3.0
"""Seconds for a quick measurement; after them no further round begins, except for the first FEWEST_ROUNDS."""

FEWEST_ROUNDS = 3
"""Rounds over all points that are made where they take at most LONGEST times the intended seconds."""

LONGEST = 3.0
"""After so many times the intended seconds no further round begins; the first round is always completed."""

MOST_ROUNDS = 15
"""Maximum number of rounds, however little time they took."""

CONTEXTS = (128, 1024, 4096, 16384)
"""Tokens in the cache when passes are timed, up to the profile's context."""

MOST_READ = 1024
"""Tokens in the cache at most where it can only be filled by reading, as with a recurrent state. Such a state takes as
long to use whatever the length of the text; only the layers with attention do not."""

FURTHER_ROWS, FURTHER_ROUNDS = (1, 4, 8), 2
"""Row counts that are timed at every context but the first, besides the largest one, and how often. What a fuller cache
adds to passes of other row counts is interpolated: attention grows evenly with the rows."""

PROMPT_ROWS = 64
"""Tokens of a prompt on which its reading is timed."""

COARSE_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Row counts to time where a model is too slow to time every row count."""


def cost_points(
    model: Model,
    runtime: Runtime,
    limit: int,
    *,
    contexts: Sequence[int] = CONTEXTS,
    seconds: float = QUICK_SECONDS,
    snapshots: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> CostPoints:
    """T(rows, context) as `points_on` measures it, on a context that is opened for the measurement.

    snapshots  see `open_context`
    """
    cells = min(runtime.context, max(contexts)) + limit + 64
    with open_context(model, runtime, cells=cells, num_ids=2, max_rows=limit, snapshots=snapshots) as context:
        return points_on(context, limit, contexts=contexts, seconds=seconds, progress=progress)


def points_on(
    context: Context,
    limit: int,
    *,
    contexts: Sequence[int] = CONTEXTS,
    seconds: float = QUICK_SECONDS,
    progress: Callable[[float], None] = lambda share: None,
) -> CostPoints:
    """Median milliseconds of passes over 1..limit rows, all with logits, in interleaved rounds, on an empty context.

    Each pass runs twice in a row. The second run gives its time; the extra time of the first is the price of changing
    the row count. At contexts after the first only few row counts are timed.

    contexts  tokens in the cache before the pass; those that fit are measured
    seconds   for all points; LONGEST times as many where the passes are slow
    progress  receives the share that is done, 0 to 1
    """
    timer = PassTimer(context)
    room = context.cells - limit - 1
    if context.model.has_recurrent_memory:
        room = min(room, MOST_READ)
    fills = [c for c in contexts if c <= room] or [max(room, 1)]
    lines: list[list[float]] = []
    changes: list[float] = []
    rows: list[int] = []
    for done, fill in enumerate(fills):
        timer.fill(fill)
        if lines:
            lines.append(_further_line(timer, rows, lines[-1]))
            progress((done + 1) / len(fills))
            continue
        if not rows:
            slow = timer.time(1) * limit * limit / 4 * FEWEST_ROUNDS > seconds * 1000
            rows = [n for n in COARSE_ROWS if n < limit] + [limit] if slow else list(range(1, limit + 1))
        timed: list[list[float]] = [[] for _ in rows]
        began = perf_counter()
        for round_ in range(MOST_ROUNDS):
            share = (perf_counter() - began) / max(seconds, 1e-9)
            if round_ and share > (1 / len(fills) if round_ >= FEWEST_ROUNDS else LONGEST):
                break
            for n, times in zip(rows, timed, strict=True):
                first = timer.time(n)
                times.append(timer.time(n))
                changes.append(first - times[-1])
            progress((done + (round_ + 1) / MOST_ROUNDS) / len(fills))
        lines.append([round(median(times), 4) for times in timed])
        progress((done + 1) / len(fills))
    change_ms = max(0.0, round(median(changes), 4)) if len(rows) > 1 else 0.0
    return CostPoints(tuple(fills), tuple(rows), tuple(map(tuple, lines)), change_ms=change_ms)


def _further_line(timer: PassTimer, rows: Sequence[int], line: Sequence[float]) -> list[float]:
    """Milliseconds of passes over `rows` rows, with a fuller cache than at the context before.

    line  milliseconds at the next shorter context
    """
    few = sorted({*(n for n in FURTHER_ROWS if n < rows[-1]), rows[-1]})
    added = []
    for n in few:
        timer.time(n)
        ms = min(timer.time(n) for _ in range(FURTHER_ROUNDS))
        added.append(max(0.0, ms - float(np.interp(n, rows, line))))
    return [round(ms + float(np.interp(n, few, added)), 4) for n, ms in zip(rows, line, strict=True)]


class PassTimer:
    """Times passes over `sequences` sequences of equal length, all rows with logits, on an empty context.

    Where the context has a sequence id more than `sequences`, its cache is filled by copying. With a recurrent state it
    needs twice as many ids: passes run on copies of the sequences, which are then dropped.
    """

    def __init__(self, context: Context, sequences: int = 1) -> None:
        self.context = context
        self.sequences = sequences
        self.filled = 0
        self.even = context.model.has_recurrent_memory
        self._fill = CacheFill(context, sequences)

    def fill(self, tokens: int) -> float:
        """Extend or cut every sequence to `tokens` tokens. Returns the milliseconds taken."""
        began = perf_counter()
        for sequence in range(self.sequences):
            start = self.filled
            if tokens < start:
                start = 0 if self.context.model.has_recurrent_memory else tokens
                self.context.drop(sequence, start)
            self._fill.extend(sequence, start, tokens)
        self.filled = tokens
        return (perf_counter() - began) * 1000

    def time(self, rows: int) -> float:
        """Milliseconds of one pass over `rows` rows, divided evenly among the sequences; the cache stays as it was.

        Where there are fewer rows than sequences, the first sequences get one row each.
        """
        context = self.context
        context.clear_batch()
        with ExitStack() as tried:
            for sequence in range(min(self.sequences, rows)):
                share = rows // self.sequences + (sequence < rows % self.sequences)
                branch = tried.enter_context(context.tried(sequence, self.filled, self.sequences + sequence))
                context.add_span(self._tokens(share), self.filled, branch, wanted=True)
            began = perf_counter()
            context.decode()
            context.logits(rows)
            return (perf_counter() - began) * 1000

    def prompt_ms(self, tokens: int = PROMPT_ROWS) -> float:
        """Milliseconds to read one token of a prompt after what is cached, measured on the next `tokens` tokens."""
        context = self.context
        tokens = min(tokens, context.num_batch, context.cells - self.sequences * self.filled)
        context.clear_batch()
        with context.tried(0, self.filled, self.sequences) as branch:
            context.add_span(self._tokens(tokens), self.filled, branch, wanted=False, last=True)
            began = perf_counter()
            context.decode()
            context.logits(1)
            return (perf_counter() - began) * 1000 / tokens

    def use_threads(self, threads: int) -> None:
        self.context.use_threads(threads)

    def _tokens(self, count: int) -> IntArray:
        return hashed_tokens(self.filled, self.filled + count, self.context.model.num_tokens)


def own_cost_points(
    model: Model, profile: Profile, *, slots: int, notify: Callable[[str], None] = lambda text: None
) -> CostPoints | None:
    """The profile's own cost curve; None where it has none or was measured under other conditions.

    notify  receives what has changed on this machine since it was measured
    """
    points = profile.measured.cost_curve if profile.measured else None
    if points is None:
        return None
    changed = fingerprint.stale(profile, model.path, profile.runtime.threads)
    if changed:
        notify(changed)
    return points if changed is None and points.sequences == slots else None
