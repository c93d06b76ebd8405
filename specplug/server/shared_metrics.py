"""Metrics under the names that vLLM and llama-server give them, so that their dashboards show this server, too.

Only those whose meaning is the same. Sources: vllm/v1/metrics/loggers.py and vllm/v1/spec_decode/metrics.py of
github.com/vllm-project/vllm; the section on metrics of tools/server/README.md of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


@dataclass(slots=True)
class Totals:
    """Sums since the start; those of prompts and times are over finished answers.

    prompt_s  seconds from the start of an answer to its first token
    decode_s  seconds from the first token of an answer to its last one
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Drafted:
    """Drafts verified, their tokens, and by depth those that were accepted."""

    drafts: int
    tokens: int
    accepted: list[int]


def vllm_metrics(
    model: str, totals: Totals, drafted: Drafted, *, running: int, waiting: int, times: Mapping[str, Histogram]
) -> Iterator[Metric]:
    """
    model  value of the label `model_name`
    times  histograms by vLLM's names for them
    """
    for name, text, value in (
        ("vllm:num_requests_running", "Answers that are being generated.", running),
        ("vllm:num_requests_waiting", "Answers that wait for a slot.", waiting),
    ):
        gauge = GaugeMetricFamily(name, text, labels=("model_name",))
        gauge.add_metric((model,), value)
        yield gauge
    for name, text, total in (
        ("vllm:prompt_tokens", "Prompt tokens of finished answers.", totals.prompt_tokens),
        ("vllm:generation_tokens", "Tokens generated.", totals.tokens),
        *_drafted("vllm", drafted),
    ):
        counter = CounterMetricFamily(name, text, labels=("model_name",))
        counter.add_metric((model,), total)
        yield counter
    by_depth = CounterMetricFamily(
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Draft tokens accepted, by position in the draft, from 0 on.",
        labels=("model_name", "position"),
    )
    for position, count in enumerate(drafted.accepted):
        by_depth.add_metric((model, str(position)), count)
    yield by_depth
    for name, histogram in times.items():
        yield from _renamed(histogram.collect(), name, {"model_name": model})


def llama_server_metrics(totals: Totals, drafted: Drafted, *, running: int, waiting: int) -> Iterator[Metric]:
    read = totals.prompt_tokens - totals.cached_tokens
    for name, text, value in (
        ("llamacpp:prompt_tokens", "Prompt tokens of finished answers that were not in the KV cache.", read),
        ("llamacpp:prompt_seconds", "Seconds in which the prompts of finished answers were read.", totals.prompt_s),
        ("llamacpp:tokens_predicted", "Tokens generated.", totals.tokens),
        ("llamacpp:tokens_predicted_seconds", "Seconds in which finished answers were generated.", totals.decode_s),
        *_drafted("llamacpp", drafted),
    ):
        yield CounterMetricFamily(name, text, value=value)
    yield GaugeMetricFamily("llamacpp:requests_processing", "Answers that are being generated.", value=running)
    yield GaugeMetricFamily("llamacpp:requests_deferred", "Answers that wait for a slot.", value=waiting)


def _drafted(prefix: str, drafted: Drafted) -> list[tuple[str, str, float]]:
    return [
        (f"{prefix}:spec_decode_num_drafts", "Drafts verified.", drafted.drafts),
        (f"{prefix}:spec_decode_num_draft_tokens", "Draft tokens verified.", drafted.tokens),
        (f"{prefix}:spec_decode_num_accepted_tokens", "Draft tokens accepted.", sum(drafted.accepted)),
    ]


def _renamed(metrics: Iterable[Metric], name: str, labels: Mapping[str, str]) -> Iterator[Metric]:
    """The same samples under another name, with further labels."""
    for metric in metrics:
        renamed = Metric(name, metric.documentation, metric.type)
        for sample in metric.samples:
            ending = sample.name.removeprefix(metric.name)
            if ending != "_created":
                renamed.add_sample(name + ending, {**labels, **sample.labels}, sample.value)
        yield renamed
