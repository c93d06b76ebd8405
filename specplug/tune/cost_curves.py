"""Measures T(rows, context), the time of a pass, with intervals; and chooses the thread count to measure it with.

This module decides how often each point is timed. It does not depend on an engine: it receives a timer of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

from specplug.bench.statistics import Interval, median_interval
from specplug.profile import CostPoints
from specplug.tune.budget import too_small

TOLERANCE = 0.03
"""A point is settled when both ends of its 95% interval lie within this share of its median."""

FEWEST_ROUNDS, MOST_ROUNDS = 3, 60
"""Rounds over the points of one context."""

ENOUGH_ROUNDS = 20
"""Rounds that usually settle a point."""

OUTLIER = 1.5
"""A pass that took more than this many times the median was disturbed by something else on the machine."""

SHARE_OF_CONTEXT = 0.4
"""A context is left out when filling the cache and the fewest rounds would take more than this share of the time that
is left."""

DENSE = tuple(range(1, 25))
COARSE = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24)
SPARSE = (1, 2, 4, 8, 16)
"""Row counts to time: the first of these three lists that the time allows."""

FURTHER = (32, 48, 64, 96, 128, 192, 256)
"""Row counts that follow any of these lists."""

CONTEXTS = (256, 2048, 8192)
"""Tokens in the cache at which costs are measured, where the profile's context and the time allow it."""

ROWS, MANY_ROWS = 25, 96
"""Draft rows, beside one row per sequence, up to which costs are measured. MANY_ROWS is the limit where a pass with
ROWS draft rows costs at most STEEP times as much as a pass with none."""

STEEP = 3.0

Progress = Callable[[float], None]


class PassTimer(Protocol):
    """Times single passes of an engine over `sequences` sequences of equal length, in milliseconds.

    even  whether every pass that is run has as many rows for each of its sequences
    """

    sequences: int
    even: bool

    def fill(self, tokens: int) -> float:
        """Fill every sequence up to so many tokens; returns the milliseconds that this took."""

    def time(self, rows: int) -> float: ...

    def prompt_ms(self) -> float:
        """Milliseconds to read one token of a prompt after what is cached."""

    def use_threads(self, threads: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Curve:
    """The time of passes over `sequences` sequences: `intervals[context][row count]`, milliseconds.

    prompt_ms  time to read one token of a prompt
    change_ms  how much longer a pass takes after a pass with another row count
    notes      sentences for the user about the quality of the measurement
    """

    sequences: int
    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    intervals: tuple[tuple[Interval, ...], ...]
    rounds: int
    prompt_ms: float
    change_ms: float
    notes: tuple[str, ...] = field(default=())

    @property
    def points(self) -> CostPoints:
        """The medians."""
        lines = tuple(tuple(round(i.median, 4) for i in line) for line in self.intervals)
        return CostPoints(self.contexts, self.rows, lines, self.sequences, self.change_ms)

    def as_mapping(self) -> dict[str, Any]:
        """Plain data, for journals and documents: medians, and both ends of their intervals."""
        return {
            "sequences": self.sequences,
            "contexts": list(self.contexts),
            "rows": list(self.rows),
            "ms": [[round(i.median, 4) for i in line] for line in self.intervals],
            "low": [[round(i.low, 4) for i in line] for line in self.intervals],
            "high": [[round(i.high, 4) for i in line] for line in self.intervals],
            "rounds": self.rounds,
            "prompt_ms": round(self.prompt_ms, 4),
            "change_ms": self.change_ms,
            "notes": list(self.notes),
        }

    @classmethod
    def from_mapping(cls, data: dict[str, Any]) -> Curve:
        """The inverse of `as_mapping`."""
        lines = zip(data["ms"], data["low"], data["high"], strict=True)
        return cls(
            data["sequences"],
            tuple(data["contexts"]),
            tuple(data["rows"]),
            tuple(tuple(Interval(*values) for values in zip(*line, strict=True)) for line in lines),
            data["rounds"],
            data["prompt_ms"],
            data["change_ms"],
            tuple(data["notes"]),
        )


def measure_costs(
    open_timer: Callable[[int, int, int], AbstractContextManager[PassTimer]],
    levels: Sequence[int],
    context: int,
    seconds: float,
    progress: Progress = lambda share: None,
) -> Iterator[Curve]:
    """Measure a curve for each level, which is a number of sequences that run at once.

    open_timer  opens a timer, given the sequences, the most tokens in each, and the most rows of a pass
    context     tokens that a sequence can hold
    """
    room = context - MANY_ROWS
    contexts = [tokens for tokens in CONTEXTS if tokens <= room] or [max(1, room)]
    for level in levels:
        own = contexts if level == 1 else contexts[:1]  # filling takes time for every sequence
        with open_timer(level, own[-1], level + MANY_ROWS) as timer:
            few, more = (min(timer.time(rows) for _ in range(3)) for rows in (level, level + ROWS))
            limit = level + (ROWS if more > STEEP * few else MANY_ROWS)
            curve = measure_curve(timer, limit, own, seconds / len(levels), progress=progress)
        yield curve


def measure_curve(
    timer: PassTimer,
    limit: int,
    contexts: Sequence[int],
    seconds: float,
    *,
    progress: Progress = lambda share: None,
) -> Curve:
    """Time passes with 1 to `limit` rows at the given contexts (tokens in the cache, ascending).

    Rounds over all row counts are repeated until every point is settled or the time is over. Each pass runs twice in
    a row: the second run measures the pass, and the first, how much longer it takes after another row count.

    The first context is always measured; a later one only where filling the cache leaves time for it.
    """
    began = perf_counter()
    fill_ms = timer.fill(contexts[0])
    prompt_ms = timer.prompt_ms()
    rows = _rows(timer, limit, seconds / len(contexts), seconds)
    lines: list[list[list[float]]] = []
    changes: list[float] = []
    done: list[int] = []
    rounds = 0
    round_seconds = 0.0  # of the first round at the latest context
    for place, context in enumerate(contexts):
        if place:
            expected = fill_ms / contexts[0] * (context - done[-1]) / 1000 + FEWEST_ROUNDS * round_seconds
            left = seconds - (perf_counter() - began)
            if expected > SHARE_OF_CONTEXT * left:
                break
            timer.fill(context)
        until = began + seconds * (place + 1) / len(contexts)
        line: list[list[float]] = [[] for _ in rows]
        for round_ in range(MOST_ROUNDS):
            if round_ >= FEWEST_ROUNDS and (perf_counter() > until or all(_settled(times) for times in line)):
                break
            round_began = perf_counter()
            for n, times in zip(rows, line, strict=True):
                if not _settled(times):
                    after_another = timer.time(n)
                    times.append(timer.time(n))
                    changes.append(after_another - times[-1])
            if not round_:
                round_seconds = perf_counter() - round_began
            rounds += 1
            progress(min(1.0, (perf_counter() - began) / seconds))
        lines.append(line)
        done.append(context)
    intervals = tuple(tuple(median_interval(times) for times in line) for line in lines)
    notes = [*_outliers(rows, done, lines), *_unsettled(rows, done, intervals), *_sawtooth(rows, intervals[0])]
    if len(done) < len(contexts):
        notes.append(
            f"contexts of {', '.join(map(str, contexts[len(done) :]))} tokens were left out: they take too long for "
            "this budget"
        )
    change_ms = max(0.0, round(median_interval(changes).median, 4))
    return Curve(timer.sequences, tuple(done), rows, intervals, rounds, prompt_ms, change_ms, tuple(notes))


def choose_threads(timer: PassTimer, cores: int, seconds: float) -> tuple[int, int, dict[int, float]]:
    """The thread counts for passes of one row and of several, and the median milliseconds of one row by thread count.

    Among thread counts within 2% of the fastest one-row pass, the four-row pass decides. Passes of several rows get
    another count only where it makes them faster by more than 5%.
    """
    counts = sorted({cores, max(1, cores - 1), max(1, cores // 2), 1 if cores <= 4 else max(1, cores // 4)})
    times: dict[int, tuple[list[float], list[float]]] = {count: ([], []) for count in counts}
    began = perf_counter()
    for round_ in range(MOST_ROUNDS):
        if round_ >= FEWEST_ROUNDS and perf_counter() - began > seconds:
            break
        for count, (one_row, several) in times.items():
            timer.use_threads(count)
            timer.time(1)  # the first pass after a change starts threads
            one_row.append(timer.time(1))
            several.append(timer.time(4))
    medians = {count: median_interval(one_row).median for count, (one_row, _) in times.items()}
    near = [count for count in counts if medians[count] <= 1.02 * min(medians.values())]
    four_rows = {count: median_interval(several).median for count, (_, several) in times.items()}
    best = min(near, key=four_rows.__getitem__)
    batch = min(counts, key=four_rows.__getitem__)
    if four_rows[batch] > 0.95 * four_rows[best]:
        batch = best
    timer.use_threads(best)
    return best, batch, {count: round(ms, 3) for count, ms in medians.items()}


def _rows(timer: PassTimer, limit: int, seconds: float, most_seconds: float) -> tuple[int, ...]:
    """The row counts to time: all of them where ENOUGH_ROUNDS rounds fit into `seconds`, else fewer.

    UsageError when not even FEWEST_ROUNDS rounds over the shortest list fit into `most_seconds`.
    """
    first = timer.sequences
    if timer.even:
        limit -= limit % first
    timer.time(1)
    few, many = timer.time(1), timer.time(limit)
    slope = (many - few) / max(1, limit - 1)
    rows: list[int] = []
    total = 0.0
    for choice in (DENSE, COARSE, SPARSE):
        below = (n for n in SPARSE if n < first)  # a batch at its end, when some sequences have ended
        counts = (first * n if timer.even else first - 1 + n for n in (*choice, *FURTHER))
        rows = sorted({1, limit, *below, *(n for n in counts if n < limit)})
        total = 2 * sum(few + slope * (n - 1) for n in rows) / 1000
        if (ENOUGH_ROUNDS if choice is DENSE else FEWEST_ROUNDS) * total < seconds:
            break
    needed = FEWEST_ROUNDS * total
    if needed > most_seconds:
        raise too_small(f"timing passes of 1 to {limit} rows", needed, most_seconds)
    return tuple(rows)


def _settled(times: Sequence[float]) -> bool:
    if len(times) < 6:
        return False
    interval = median_interval(times)
    return max(interval.high - interval.median, interval.median - interval.low) <= TOLERANCE * interval.median


def _outliers(rows: Sequence[int], contexts: Sequence[int], lines: Sequence[Sequence[Sequence[float]]]) -> list[str]:
    outliers, total, worst = 0, 0, (1.0, 0, 0)
    for context, line in zip(contexts, lines, strict=True):
        for n, times in zip(rows, line, strict=True):
            middle = median_interval(times).median
            over = [ms / middle for ms in times if ms > OUTLIER * middle]
            outliers += len(over)
            total += len(times)
            worst = max(worst, (max(over, default=1.0), n, context))
    if not outliers:
        return []
    return [
        f"{outliers} of {total} passes took more than {OUTLIER:g} times their median (the longest {worst[0]:.1f}, "
        f"{worst[1]} rows at {worst[2]} tokens): another program was running; medians are hardly affected, but an idle "
        "machine measures better"
    ]


def _unsettled(rows: Sequence[int], contexts: Sequence[int], intervals: Sequence[Sequence[Interval]]) -> list[str]:
    wide = [
        (max(i.high - i.median, i.median - i.low) / i.median, n, context)
        for context, line in zip(contexts, intervals, strict=True)
        for n, i in zip(rows, line, strict=True)
    ]
    open_ = [entry for entry in wide if entry[0] > TOLERANCE]
    if not open_:
        return []
    share, n, context = max(open_)
    return [
        f"{len(open_)} of {len(wide)} points have an interval wider than {TOLERANCE:.0%} (the widest {share:.0%}, "
        f"{n} rows at {context} tokens): a larger --budget narrows them"
    ]


def _sawtooth(rows: Sequence[int], line: Sequence[Interval]) -> list[str]:
    """A note on passes that take less time than passes with fewer rows, by more than the noise."""
    notes = []
    for i, n in enumerate(rows):
        cheaper = [m for m, j in zip(rows[i + 1 :], line[i + 1 :], strict=True) if j.high < line[i].low]
        if cheaper:
            notes.append(f"{n} rows cost more than {cheaper[0]}")
    return [f"the cost curve is not monotonic: {'; '.join(notes[:4])}"] if notes else []
