"""Counts drafts and accepted tokens, and publishes the sums as `specplug:` counters beside vLLM's own on /metrics.

Imports no vllm: workers write their counters to the folder that PROMETHEUS_MULTIPROC_DIR names, and vLLM's server
collects them from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from specplug.core import FloatArray, IntArray

PUBLISH_SECONDS = 0.2
"""The least time between two updates of the Prometheus counters."""

AGREED = "agreed"
"""The label `proposer` of a token that several proposers drafted."""

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "steps": ("Passes that decoded and read no prompt.", ()),
    "planned_rows": ("Rows of those passes: one per sequence and one per verified draft token.", ()),
    "drafts": ("Drafts sent, by the proposer of their first token.", ("proposer",)),
    "draft_tokens": ("Draft tokens sent.", ("proposer",)),
    "accepted_tokens": ("Draft tokens accepted.", ("proposer",)),
    "predicted_tokens": ("Draft tokens that the planner expected to be accepted.", ()),
    "guard_trips": ("Faults of proposers that were replaced by empty drafts.", ("proposer", "kind")),
    "proposers_off": ("Proposers that are disabled after too many faults.", ("proposer",)),
    "context_choices": ("Choices of the parts of a text that short_context keeps, first ones and others.", ("kind",)),
    "draft_milliseconds": ("Time spent on drafting, planning and learning.", ()),
}
"""Name to help text and labels."""

Values = dict[str, dict[tuple[str, ...], float]]
"""Values by metric name and labels."""


class DraftCounters:
    """Sums since the start. `names` are the proposers' names, by index."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.steps = 0
        self.rows = 0
        self.draft_ns = 0
        self.predicted = 0.0
        self.drafts: Counter[str] = Counter()
        self.draft_tokens: Counter[str] = Counter()
        self.accepted_tokens: Counter[str] = Counter()

    def add_drafts(self, lengths: IntArray, owners: IntArray, path: FloatArray) -> None:
        """Count drafts that are sent to vLLM.

        lengths  int32[n]       draft tokens per sequence
        owners   int32[n, k]    the proposer of each token, by index; -1 where several proposed it
        path     float64[n, k]  P(accepted) of each token
        """
        sent = np.arange(owners.shape[1]) < lengths[:, None]
        self.predicted += float(path[sent].sum())
        for counter, indices in ((self.drafts, owners[lengths > 0, 0]), (self.draft_tokens, owners[sent])):
            for owner, count in enumerate(np.bincount(indices + 1).tolist(), start=-1):
                if count:
                    counter[self._name(owner)] += count

    def add_accepted(self, owners: Sequence[int]) -> None:
        """Count accepted tokens; `owners` has the proposer of each, as in `add_drafts`."""
        for owner in owners:
            self.accepted_tokens[self._name(owner)] += 1

    def values(self) -> Values:
        """The values of METRICS, except for the two about faults, which `Faults` counts."""
        return {
            "steps": {(): self.steps},
            "planned_rows": {(): self.rows},
            "drafts": _labelled(self.drafts),
            "draft_tokens": _labelled(self.draft_tokens),
            "accepted_tokens": _labelled(self.accepted_tokens),
            "predicted_tokens": {(): self.predicted},
            "draft_milliseconds": {(): self.draft_ns / 1e6},
        }

    def _name(self, owner: int) -> str:
        return AGREED if owner < 0 else self.names[owner]


_prometheus_counters: dict[str, Any] = {}
"""One counter per name and process: Prometheus refuses a second one of the same name."""


class PrometheusCounters:
    """Publishes the sums of one source as Prometheus counters, which several sources of a process share."""

    def __init__(self) -> None:
        from prometheus_client import Counter

        if not _prometheus_counters:
            for name, (text, labels) in METRICS.items():
                _prometheus_counters[name] = Counter(f"specplug:{name}", text, labels)
        self._published: dict[tuple[str, tuple[str, ...]], float] = {}

    def update(self, values: Values) -> None:
        """Increase the counters by what `values` has grown since the last update."""
        for name, by_labels in values.items():
            for labels, value in by_labels.items():
                increase = value - self._published.get((name, labels), 0.0)
                if increase > 0:
                    counter = _prometheus_counters[name]
                    (counter.labels(*labels) if labels else counter).inc(increase)
                    self._published[name, labels] = value


def read_counters(folder: str) -> dict[str, float]:
    """Counters in a multi-process folder, ours and vLLM's: by name, summed over all processes and labels."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    sums: dict[str, float] = {}
    for metric in MultiProcessCollector(CollectorRegistry(), path=folder).collect():
        if metric.type == "counter":
            sums[metric.name] = sum(sample.value for sample in metric.samples if sample.name.endswith("_total"))
    return sums


def _labelled(counts: Counter[str]) -> dict[tuple[str, ...], float]:
    return {(name,): float(count) for name, count in counts.items()}
