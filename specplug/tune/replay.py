"""What a setting would do over recorded answers: the code that runs live, with the target's answers read from a trace
and time counted from measured costs.

Knows traces, settings, and processes to replay them in. Knows no engine; runs no model.
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


def replay(
    setting: Setting,
    trace: Trace,
    costs: Costs,
    *,
    learned: Mapping[str, Sequence[float]] | None = None,
) -> Prediction:
    """Drive the setting over the trace, `costs.points.sequences` answers at a time. Deterministic."""
    driver = BatchReplay if costs.batch else Replay
    one = driver(setting, costs, max_tokens=trace.about["max_tokens"], learned=learned)
    sums: dict[int, Sums] = {}
    for group in together(trace.answers, costs.points.sequences):
        sums |= {id(answer): found for answer, found in zip(group, one.run(group), strict=True)}
    return Prediction(
        tuple(sums[id(answer)] for answer in trace.answers),
        tuple(answer.category for answer in trace.answers),
        one.speculator.table.learned(),
    )


def replay_all(
    settings: Sequence[Setting],
    trace_path: Path,
    costs: Costs,
    *,
    seconds: float | None = None,
    workers: int | None = None,
) -> Iterator[tuple[Setting, Prediction]]:
    """Replays of all settings over a trace file, over processes, as they are done.

    seconds  when they are over, settings not yet begun are left out
    """
    workers = min(workers or hardware.usable_cores(), MAX_WORKERS, len(settings)) or 1
    until = None if seconds is None else perf_counter() + seconds
    spawn = get_context("spawn")  # a fork would copy an engine with its threads half alive
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has the journal
    trace = load(trace_path)
    assert trace is not None
    _worker = trace, costs


def _replay_one(setting: Setting) -> Prediction:
    assert _worker is not None
    return replay(setting, *_worker)


def together(answers: Sequence[Answer], size: int) -> Iterator[Sequence[Answer]]:
    """Answers given at once, `size` at a time; turns of one talk are never together, so first turns come first."""
    if size == 1:
        yield from ([answer] for answer in answers)
        return
    by_turn: dict[int, list[Answer]] = {}
    for answer in answers:
        by_turn.setdefault(answer.turn, []).append(answer)
    for line in by_turn.values():
        yield from (line[i : i + size] for i in range(0, len(line), size))
