"""Replays settings over recorded answers: the code that runs live, with the target's tokens read from a trace and the
time added up from measured costs.

This module distributes replays over processes. It does not depend on an engine and runs no model.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

from specplug.machine import hardware
from specplug.tune.candidates import Setting
from specplug.tune.prediction import Costs, Prediction, Sums
from specplug.tune.replay_batch import BatchReplay
from specplug.tune.replay_sequences import Replay
from specplug.tune.trace import Answer, Trace, load

MAX_WORKERS = 16
"""Most processes."""


def replay(
    setting: Setting,
    trace: Trace,
    costs: Costs,
    *,
    learned: Mapping[str, Sequence[float]] | None = None,
) -> Prediction:
    """Replay a setting over the trace, `costs.points.sequences` answers at a time. The result is deterministic.

    learned  acceptance counts that the buckets start with
    """
    driver = BatchReplay if costs.batch else Replay
    runner = driver(setting, costs, max_tokens=trace.about["max_tokens"], learned=learned)
    sums: dict[int, Sums] = {}
    for group in grouped(trace.answers, costs.points.sequences):
        sums |= {id(answer): sums_of_answer for answer, sums_of_answer in zip(group, runner.run(group), strict=True)}
    return Prediction(
        tuple(sums[id(answer)] for answer in trace.answers),
        tuple(answer.category for answer in trace.answers),
        runner.speculator.table.learned(),
    )


def replay_all(
    settings: Sequence[Setting],
    trace_path: Path,
    costs: Costs,
    *,
    seconds: float | None = None,
    workers: int | None = None,
) -> Iterator[tuple[Setting, Prediction]]:
    """Replay all settings over a trace file in several processes; yields each prediction when it is ready.

    seconds  after these, settings that have not started are left out
    """
    workers = min(workers or hardware.usable_cores(), MAX_WORKERS, len(settings)) or 1
    until = None if seconds is None else perf_counter() + seconds
    spawn = get_context("spawn")  # a fork would copy an engine without its threads
    pool = ProcessPoolExecutor(workers, spawn, _start, (trace_path, costs))
    try:
        waiting = iter(settings)
        running = {pool.submit(_replay_one, setting): setting for setting in islice(waiting, 2 * workers)}
        while running:
            done = next(as_completed(running))
            yield running.pop(done), done.result()
            if until is None or perf_counter() < until:
                following = next(waiting, None)
                if following is not None:
                    running[pool.submit(_replay_one, following)] = following
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Trace, Costs] | None = None


def _start(trace_path: Path, costs: Costs) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the process that has the journal handles Ctrl-C
    trace = load(trace_path)
    assert trace is not None
    _worker = trace, costs


def _replay_one(setting: Setting) -> Prediction:
    assert _worker is not None
    return replay(setting, *_worker)


def grouped(answers: Sequence[Answer], size: int) -> Iterator[Sequence[Answer]]:
    """Groups of up to `size` answers that run at once. Turns of one conversation are never in one group: with groups
    of several answers, all first turns come before all second turns."""
    if size == 1:
        yield from ([answer] for answer in answers)
        return
    by_turn: dict[int, list[Answer]] = {}
    for answer in answers:
        by_turn.setdefault(answer.turn, []).append(answer)
    for line in by_turn.values():
        yield from (line[i : i + size] for i in range(0, len(line), size))
