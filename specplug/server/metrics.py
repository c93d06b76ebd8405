"""The server's counters and timings, for the page (/specplug/stats) and for Prometheus (/metrics).

It receives counts and times, but neither prompts nor answers.
State: totals since the start, the tokens of the last WINDOW_S seconds, and the passes of the last minute.
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
from specplug.server.recent_passes import RecentPasses
from specplug.server.scheduler import Scheduler
from specplug.server.shared_metrics import Drafted, Totals, llama_server_metrics, vllm_metrics

WINDOW_S = 10.0
"""Seconds over which tokens per second are averaged."""

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper bounds of the histograms, in seconds."""


class Metrics:
    """The metrics of one server. `record` is called in the engine's thread with the deltas of every step."""

    def __init__(self, engine: Engine, scheduler: Scheduler, model: str) -> None:
        """`model`: its name in metrics that have one."""
        self._model = model
        self._engine = engine
        self._scheduler = scheduler
        self._recent_tokens: deque[tuple[float, int]] = deque()  # (time, tokens)
        self._passes = RecentPasses()
        self._last_token: dict[Job, float] = {}
        self.registry = CollectorRegistry()
        counter, histogram = _counter(self.registry), _histogram(self.registry)
        self.requests = counter("specplug_requests", "HTTP requests answered.", ("path", "status"))
        self.ignored_fields = counter("specplug_ignored_fields", "Fields of requests that have no meaning here.")
        self._totals = Totals()
        self._first_s = histogram(
            "specplug_time_to_first_token_seconds", "Seconds from a request to the first token of an answer."
        )
        self._gap_s = histogram("specplug_inter_token_seconds", "Seconds between two steps of an answer.")
        self._answer_s = histogram("specplug_answer_seconds", "Seconds from a request to the last token of an answer.")
        self.registry.register(_LiveCollector(self))

    def record(self, deltas: Sequence[tuple[Job, Delta]]) -> None:
        now = monotonic()
        for job, delta in deltas:
            # A cancelled job gets no last delta that would remove it from _last_token again.
            if delta.tokens and not job.cancelled:
                self._totals.tokens += len(delta.tokens)
                self._recent_tokens.append((now, len(delta.tokens)))
                if job in self._last_token:
                    self._gap_s.observe(now - self._last_token[job])
                else:
                    self._first_s.observe(now - job.submitted_s)
                self._last_token[job] = now
            if delta.is_last:
                self._last_token.pop(job, None)
            if delta.finish and delta.report is not None:
                totals, report = self._totals, delta.report
                totals.prompt_tokens += report.prompt_tokens
                totals.cached_tokens += report.cached
                totals.prompt_s += report.prompt_ms / 1000
                totals.decode_s += report.decode_ms / 1000
                self._answer_s.observe(now - job.submitted_s)
        advanced = [job for job, delta in deltas if delta.tokens and not job.cancelled]
        reading = any(job.stream is not None and job.stream.reading for job in list(self._scheduler.active))
        self._passes.record(now, advanced, with_prompt=reading)
        self._passes.forget(job for job, delta in deltas if delta.is_last)
        # One that was cancelled meanwhile has been forgotten already, and gets no last delta.
        self.forget([job for job in advanced if job.cancelled])
        while self._recent_tokens and self._recent_tokens[0][0] < now - WINDOW_S:
            self._recent_tokens.popleft()

    def forget(self, jobs: Sequence[Job]) -> None:
        """Drop the state of cancelled jobs."""
        for job in jobs:
            self._last_token.pop(job, None)
        self._passes.forget(jobs)

    def snapshot(self) -> dict[str, Any]:
        """The current figures, as the page shows them."""
        now = monotonic()
        scheduler, engine = self._scheduler, self._engine
        running = list(scheduler.active)
        slots = [
            {
                "state": "reading" if job.stream is None or job.stream.reading else "answering",
                "prompt_tokens": len(job.prompt),
                "tokens": len(job.tokens),
                "speculates": job.max_draft > 0,
            }
            for job in running
        ]
        rate = sum(count for when, count in list(self._recent_tokens) if when >= now - WINDOW_S) / WINDOW_S
        return {
            "slots": slots + [{"state": "idle"}] * (engine.slots - len(slots)),
            "waiting": scheduler.waiting,
            "kv_tokens": {"held": sum(job.reserved_tokens for job in running), "limit": engine.kv_tokens},
            "tokens_per_second": round(rate, 2),
            "last_minute": self._passes.snapshot(now),
            "proposers": [
                {
                    "method": name,
                    "guessed": engine.loop.verified[index].tolist(),
                    "accepted": engine.loop.accepted[index].tolist(),
                }
                for index, name in enumerate(engine.source_names)
            ],
        }

    def collect(self) -> Iterator[Metric]:
        """The metrics that are read at scrape time: gauges, and the counters that the engine keeps."""
        scheduler, engine = self._scheduler, self._engine
        active, waiting, totals = list(scheduler.active), scheduler.waiting, self._totals
        for name, text, total in (
            ("specplug_prompt_tokens", "Prompt tokens of finished answers.", totals.prompt_tokens),
            ("specplug_cached_prompt_tokens", "Prompt tokens found in the KV cache.", totals.cached_tokens),
            ("specplug_generated_tokens", "Tokens generated.", totals.tokens),
        ):
            yield CounterMetricFamily(name, text, value=total)
        yield _gauge("specplug_waiting_answers", "Answers that wait for a slot.", waiting)
        yield _gauge("specplug_running_answers", "Answers that are being generated.", len(active))
        yield _gauge("specplug_slots", "Largest number of answers that run at once.", engine.slots)
        yield _gauge(
            "specplug_kv_tokens_reserved",
            "KV cache tokens reserved for running answers.",
            sum(job.reserved_tokens for job in active),
        )
        guessed = CounterMetricFamily(
            "specplug_draft_tokens", "Draft tokens verified, by position in the draft.", labels=("proposer", "place")
        )
        accepted = CounterMetricFamily(
            "specplug_accepted_tokens", "Draft tokens accepted, by position in the draft.", labels=("proposer", "place")
        )
        for index, name in enumerate(engine.source_names):
            for family, table in ((guessed, engine.loop.verified), (accepted, engine.loop.accepted)):
                for position, count in enumerate(table[index].tolist(), start=1):
                    if count:
                        family.add_metric((name, str(position)), count)
        yield guessed
        yield accepted
        loop = engine.loop
        drafted = Drafted(loop.drafts, int(loop.verified.sum()), loop.accepted.sum(axis=0).tolist())
        times = {"vllm:time_to_first_token_seconds": self._first_s, "vllm:e2e_request_latency_seconds": self._answer_s}
        counts = {"running": len(active), "waiting": waiting}
        yield from vllm_metrics(self._model, totals, drafted, times=times, **counts)
        yield from llama_server_metrics(totals, drafted, **counts)


class _LiveCollector:
    """prometheus-client calls `collect` at every scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics.collect()


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _counter(registry: CollectorRegistry) -> Any:
    def make(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=registry)

    return make


def _histogram(registry: CollectorRegistry) -> Any:
    def make(name: str, text: str) -> Histogram:
        return Histogram(name, text, registry=registry, buckets=BUCKETS_S)

    return make
