"""Measures T(rows, context) of a model on this machine, and remembers it.

Knows how to time passes of llama.cpp. Knows no drafts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from platformdirs import user_cache_dir

from specplug import hardware
from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context, open_context
from specplug.engines.llama_cpp.model import Model
from specplug.errors import SpecplugError
from specplug.files import write_atomically
from specplug.profile import CostPoints, Runtime

QUICK_SECONDS = 3.0
"""Time for a first look; further rounds stop here once every point has been seen three times."""

FEWEST_ROUNDS = 3
MOST_ROUNDS = 15
SCHEMA = 1

CONTEXTS = (128, 1024)
"""Tokens in the cache at which passes are timed."""

COARSE_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Row counts for models that are too slow to try every one."""


def cost_points(
    model: Model,
    runtime: Runtime,
    limit: int,
    *,
    contexts: Sequence[int] = CONTEXTS,
    seconds: float = QUICK_SECONDS,
    progress: Callable[[float], None] = lambda share: None,
) -> CostPoints:
    """`points_on` a context of its own."""
    cells = min(runtime.context, max(contexts)) + limit + 64
    with open_context(model, runtime, cells=cells, num_ids=1, max_rows=limit) as context:
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

    contexts  tokens in the cache before the pass; those that fit are measured
    seconds   time for all of it; every point is seen FEWEST_ROUNDS times at least
    """
    room = context.cells - limit - 1
    fills = [c for c in contexts if c <= room] or [max(room, 1)]
    filler = np.random.default_rng(0).integers(0, context.model.num_tokens, fills[-1] + limit).astype(np.int32)
    lines: list[list[float]] = []
    rows: list[int] = []
    filled = 0
    for done, fill in enumerate(fills):
        _fill(context, filler, filled, fill)
        filled = fill
        if not rows:
            slow = _pass_ms(context, filler, fill, 1) * limit * limit / 4 * FEWEST_ROUNDS > seconds * 1000
            rows = [n for n in COARSE_ROWS if n < limit] + [limit] if slow else list(range(1, limit + 1))
        seen: list[list[float]] = [[] for _ in rows]
        began = perf_counter()
        for round_ in range(MOST_ROUNDS):
            if round_ >= FEWEST_ROUNDS and perf_counter() - began > seconds / len(fills):
                break
            for n, times in zip(rows, seen, strict=True):
                times.append(_pass_ms(context, filler, fill, n))
            progress((done + (round_ + 1) / MOST_ROUNDS) / len(fills))
        lines.append([round(median(times), 4) for times in seen])
        progress((done + 1) / len(fills))
    return CostPoints(tuple(fills), tuple(rows), tuple(tuple(line) for line in lines))


def remembered_cost_points(
    model: Model,
    key: Sequence[object],
    measure: Callable[[], CostPoints],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> CostPoints:
    """The curve from the user's cache folder, measured first where there is none for this model, machine and `key`."""
    path = _cache_path(model, key)
    found = _recall(path)
    if found is not None:
        return found
    busy = hardware.busy_warning()
    say("measuring what a pass costs here, once for this model and machine")
    points = measure()
    if busy:
        say(f"{busy}; they will be measured again next time")
        return points
    try:
        write_atomically(path, json.dumps({"schema": SCHEMA, **asdict(points)}).encode())
    except SpecplugError as error:
        say(f"{error}; the cost will be measured again next time")
    return points


def _fill(context: Context, filler: IntArray, start: int, stop: int) -> None:
    for at in range(start, stop, context.num_batch):
        context.clear_batch()
        context.add_span(filler[at : min(at + context.num_batch, stop)], at, 0, wanted=False, last=True)
        context.decode()
    context.logits(1)


def _pass_ms(context: Context, filler: IntArray, fill: int, rows: int) -> float:
    context.clear_batch()
    context.add_span(filler[fill : fill + rows], fill, 0, wanted=True)
    began = perf_counter()
    context.decode()
    context.logits(rows)
    ms = (perf_counter() - began) * 1000
    context.drop(0, fill)
    return ms


def _cache_path(model: Model, key: Sequence[object]) -> Path:
    with model.path.open("rb") as file:
        head = hashlib.sha256(file.read(1 << 22)).hexdigest()
    machine = hardware.fingerprint()
    whole = repr((SCHEMA, machine, version("llama-cpp-python"), head, model.path.stat().st_size, tuple(key)))
    return Path(user_cache_dir("specplug")) / "cost" / f"{hashlib.sha256(whole.encode()).hexdigest()[:24]}.json"


def _recall(path: Path) -> CostPoints | None:
    """What was written before; None where there is nothing, or nothing that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return CostPoints(
            tuple(map(int, data["contexts"])),
            tuple(map(int, data["rows"])),
            tuple(tuple(map(float, line)) for line in data["ms"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
