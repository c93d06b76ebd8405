"""What the server has done so far, for the page and for Prometheus.

Knows counts. Knows neither prompts nor answers.
Keeps: sums, and the steps of the last seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from specplug.server.engine_protocol import Engine
from specplug.server.jobs import Delta, Job
from specplug.server.scheduler import Scheduler

WINDOW_S = 10.0
"""Over which the rate of tokens is taken."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Figures:
    """One per server. `saw` is called in the engine's thread with everything that came."""

    def __init__(self, engine: Engine, scheduler: Scheduler) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._recent: deque[tuple[float, int]] = deque()
        self._times: deque[tuple[float, float, float]] = deque()  # when, and the loop's two sums
        self._last: dict[Job, float] = {}
        self.registry = CollectorRegistry()
        counter, histogram = _counter(self.registry), _histogram(self.registry)
        self.requests = counter("specplug_requests", "Answered requests.", ("path", "status"))
        self._prompt_tokens = counter("specplug_prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = counter("specplug_cached_prompt_tokens", "Tokens of prompts that were in the cache.")
        self._tokens = counter("specplug_generated_tokens", "Tokens of answers.")
        self._first_s = histogram("specplug_time_to_first_token_seconds", "From the request to its first token.")
        self._gap_s = histogram("specplug_inter_token_seconds", "Between two steps of an answer.")
        self._answer_s = histogram("specplug_answer_seconds", "From the request to its last token.")
        self.registry.register(_Live(self))

    def saw(self, deltas: Sequence[tuple[Job, Delta]]) -> None:
        now = monotonic()
        for job, delta in deltas:
            if delta.tokens and not job.cancelled:  # of one that nobody waits for no end will be seen
                self._tokens.inc(len(delta.tokens))
                self._recent.append((now, len(delta.tokens)))
                if job in self._last:
                    self._gap_s.observe(now - self._last[job])
                else:
                    self._first_s.observe(now - job.submitted)
                self._last[job] = now
            if delta.finish or delta.error is not None:
                self._last.pop(job, None)
            if delta.report is not None:
                report = delta.report
                self._prompt_tokens.inc(report.prompt_tokens)
                self._cached_tokens.inc(report.cached)
                self._answer_s.observe(now - job.submitted)
        loop = self._engine.loop
        self._times.append((now, loop.decode_ms, loop.plain_ms))
        while self._recent and self._recent[0][0] < now - WINDOW_S:
            self._recent.popleft()
        while self._times and self._times[0][0] < now - WINDOW_S:
            self._times.popleft()

    def forget(self, jobs: Sequence[Job]) -> None:
        """Of jobs that nobody waits for any longer."""
        for job in jobs:
            self._last.pop(job, None)

    def now(self) -> dict[str, Any]:
        """The figures that the page shows."""
        since = monotonic() - WINDOW_S
        scheduler, engine = self._scheduler, self._engine
        running = list(scheduler.active)
        slots = [
            {
                "state": "reading" if job.stream is None or job.stream.reading else "answering",
                "prompt_tokens": len(job.prompt),
                "tokens": job.emitted,
                "speculates": job.max_draft > 0,
            }
            for job in running
        ]
        rate = sum(count for when, count in list(self._recent) if when >= since) / WINDOW_S
        speedup = self._speedup(since)
        return {
            "slots": slots + [{"state": "idle"}] * (engine.slots - len(slots)),
            "waiting": scheduler.waiting,
            "kv_tokens": {"held": sum(job.reserved_tokens for job in running), "limit": engine.kv_tokens},
            "tokens_per_second": round(rate, 2),
            "speedup_over_plain": round(speedup, 3) if speedup else None,
            "proposers": [
                {
                    "method": name,
                    "guessed": engine.loop.guessed[index].tolist(),
                    "accepted": engine.loop.accepted[index].tolist(),
                }
                for index, name in enumerate(engine.source_names)
            ],
        }

    def live(self) -> Iterator[Metric]:
        """Gauges, and counters that the engine keeps."""
        scheduler, engine = self._scheduler, self._engine
        active = list(scheduler.active)
        yield _gauge("specplug_waiting_answers", "Answers that wait for a slot.", scheduler.waiting)
        yield _gauge("specplug_running_answers", "Answers under way.", len(active))
        yield _gauge("specplug_slots", "Answers that can be under way at once.", engine.slots)
        yield _gauge(
            "specplug_kv_tokens_reserved", "Tokens promised to answers.", sum(job.reserved_tokens for job in active)
        )
        guessed = CounterMetricFamily(
            "specplug_draft_tokens", "Guesses that were verified.", labels=("proposer", "place")
        )
        accepted = CounterMetricFamily(
            "specplug_accepted_tokens", "Guesses that came true.", labels=("proposer", "place")
        )
        for index, name in enumerate(engine.source_names):
            for family, table in ((guessed, engine.loop.guessed), (accepted, engine.loop.accepted)):
                for place, count in enumerate(table[index].tolist(), start=1):
                    if count:
                        family.add_metric((name, str(place)), count)
        yield guessed
        yield accepted

    def _speedup(self, since: float) -> float | None:
        """Over plain decoding; None where nothing was decoded."""
        times = [time for time in list(self._times) if time[0] >= since]
        if not self._engine.knows_plain_ms or not times:
            return None
        (_, step_ms, plain_ms), (_, step_ms_now, plain_ms_now) = times[0], times[-1]
        return (plain_ms_now - plain_ms) / (step_ms_now - step_ms) if step_ms_now > step_ms else None


class _Live:
    """Asked by prometheus-client at every scrape."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        yield from self._figures.live()


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _counter(registry: CollectorRegistry) -> Any:
    def make(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=registry)

    return make


def _histogram(registry: CollectorRegistry) -> Any:
    def make(name: str, text: str) -> Histogram:
        return Histogram(name, text, registry=registry, buckets=SECONDS)

    return make
