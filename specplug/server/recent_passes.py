"""The target passes of the last minute, and the time that drafting saved in them.

Everything is measured in that minute. No cost curve is used, because a curve that was measured on an idle machine is
wrong on a busy one. A pass that also read a prompt is left out.
State: sums by second, number of sequences and kind of pass, for at most WINDOW_S seconds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from specplug.generation.counters import Counters
from specplug.server.jobs import Job

WINDOW_S = 60.0
"""Seconds that a pass counts."""

FEWEST_PLAIN = 4
"""Plain passes of as many sequences, within the window, below which nothing is compared with them. Chosen."""

DRAFTED, AFTER_PLAIN, AFTER_DRAFTED = "drafted", "plain after plain", "plain after drafted"
"""Kinds of passes. A plain pass verifies no draft tokens. After a pass of another shape, llama.cpp prepares its shape
anew, which takes about 2 to 7% of a pass of a small model (docs/lab-book/cost-curves.md)."""


@dataclass(slots=True)
class _Sums:
    """Sums over passes.

    ms        time of the passes, drafting included
    plain_ms  their time without drafting
    """

    passes: int = 0
    tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    ms: float = 0.0
    plain_ms: float = 0.0

    def add(self, other: _Sums) -> None:
        self.passes += other.passes
        self.tokens += other.tokens
        self.draft_tokens += other.draft_tokens
        self.accepted_tokens += other.accepted_tokens
        self.ms += other.ms
        self.plain_ms += other.plain_ms


_Kind = tuple[int, str]  # number of sequences, kind of pass


class RecentPasses:
    """Counts passes in the engine's thread; `snapshot` may be called from another one."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, dict[_Kind, _Sums]]] = deque()
        self._seen: dict[Job, _Sums] = {}
        self._last_plain: int | None = None
        """Sequences of the last pass if it was a plain one."""
        self._lock = threading.Lock()  # guards _seconds

    def record(self, now: float, jobs: Iterable[Job], *, with_prompt: bool) -> None:
        """Add the pass that has just advanced `jobs`.

        now          seconds of a monotonic clock
        with_prompt  True if the pass also evaluated tokens of a prompt that has more of them
        """
        whole, sequences = _Sums(), 0
        for job in jobs:
            if job.stream is None:
                continue
            total = _sums_of(job.stream.counters)
            seen = self._seen.get(job)
            self._seen[job] = total
            if seen is None:  # the pass evaluated the end of the job's prompt
                with_prompt = True
                continue
            if total.passes > seen.passes:
                sequences += 1
                whole.add(_difference(total, seen))
        if not sequences:
            return
        whole.passes = 1
        plain = not whole.draft_tokens
        kind = DRAFTED if not plain else AFTER_PLAIN if self._last_plain == sequences else AFTER_DRAFTED
        self._last_plain = sequences if plain and not with_prompt else None
        if with_prompt:
            return
        with self._lock:
            if not self._seconds or self._seconds[-1][0] != int(now):
                self._seconds.append((int(now), {}))
            self._seconds[-1][1].setdefault((sequences, kind), _Sums()).add(whole)
            while self._seconds[0][0] < now - WINDOW_S:
                self._seconds.popleft()

    def forget(self, jobs: Iterable[Job]) -> None:
        """Drop the state of jobs that have ended."""
        for job in jobs:
            self._seen.pop(job, None)

    def snapshot(self, now: float) -> dict[str, Any]:
        """The figures of the last minute, times in milliseconds.

        `plain_ms` is the time that plain passes would have taken for the tokens of `compared_ms`, by the mean of the
        minute's own plain passes of as many sequences. `saved_by_drafting` is their quotient. It is None without
        draft tokens, or where fewer than FEWEST_PLAIN plain passes can be compared with.
        """
        kinds = self._kinds(now)
        total = _total(kinds.values())
        compared_ms = plain_ms = 0.0
        for sequences in {number for number, _ in kinds}:
            one_plain_ms = _plain_pass_ms(kinds, sequences)
            if one_plain_ms is not None:
                passes = _total(sums for (number, _), sums in kinds.items() if number == sequences)
                compared_ms += passes.ms
                plain_ms += one_plain_ms * passes.tokens / sequences
        return {
            "passes": total.passes,
            "plain_passes": sum(sums.passes for (_, kind), sums in kinds.items() if kind != DRAFTED),
            "tokens": total.tokens,
            "draft_tokens": total.draft_tokens,
            "accepted_tokens": total.accepted_tokens,
            "compared_ms": round(compared_ms, 1),
            "plain_ms": round(plain_ms, 1),
            "saved_by_drafting": round(plain_ms / compared_ms, 3) if compared_ms and total.draft_tokens else None,
        }

    def _kinds(self, now: float) -> dict[_Kind, _Sums]:
        kinds: dict[_Kind, _Sums] = {}
        with self._lock:
            for second, sums in self._seconds:
                if second >= now - WINDOW_S:
                    for kind, one in sums.items():
                        kinds.setdefault(kind, _Sums()).add(one)
        return kinds


def _plain_pass_ms(kinds: Mapping[_Kind, _Sums], sequences: int) -> float | None:
    """Mean time of a plain pass of so many sequences: after another plain one if there are enough of these."""
    after_plain = kinds.get((sequences, AFTER_PLAIN), _Sums())
    if after_plain.passes >= FEWEST_PLAIN:
        return after_plain.plain_ms / after_plain.passes
    every = _total([after_plain, kinds.get((sequences, AFTER_DRAFTED), _Sums())])
    return every.plain_ms / every.passes if every.passes >= FEWEST_PLAIN else None


def _sums_of(counters: Counters) -> _Sums:
    plain_ms = (counters.target_ns + counters.sample_ns) / 1e6
    return _Sums(
        counters.steps,
        counters.emitted_tokens,
        counters.draft_tokens,
        counters.accepted_tokens,
        plain_ms + counters.draft_ns / 1e6,
        plain_ms,
    )


def _difference(total: _Sums, seen: _Sums) -> _Sums:
    return _Sums(
        total.passes - seen.passes,
        total.tokens - seen.tokens,
        total.draft_tokens - seen.draft_tokens,
        total.accepted_tokens - seen.accepted_tokens,
        total.ms - seen.ms,
        total.plain_ms - seen.plain_ms,
    )


def _total(parts: Iterable[_Sums]) -> _Sums:
    total = _Sums()
    for part in parts:
        total.add(part)
    return total
