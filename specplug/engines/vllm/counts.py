"""What the drafts did, as plain sums, and as `specplug:` figures beside vLLM's own on /metrics.

Knows numbers and Prometheus. Knows no vllm: the server collects what workers write where PROMETHEUS_MULTIPROC_DIR says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from specplug.core import FloatArray, IntArray

AGREED = "agreed"
"""Instead of a proposer, where several guessed alike."""

FIGURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "steps": ("Passes that only decoded.", ()),
    "planned_rows": ("Rows of those passes: one per sequence and one per verified guess.", ()),
    "drafts": ("Drafts sent, by who guessed their first token.", ("proposer",)),
    "draft_tokens": ("Guesses sent.", ("proposer",)),
    "accepted_tokens": ("Guesses that came true.", ("proposer",)),
    "predicted_tokens": ("Guesses that were expected to come true.", ()),
    "guard_trips": ("Faults of proposers that became empty drafts.", ("proposer", "kind")),
    "proposers_off": ("Proposers that failed too often, and are off.", ("proposer",)),
    "draft_milliseconds": ("Time spent on drafting, planning and learning.", ()),
}
"""Name to help text and labels."""


class Counts:
    """Sums since the start. `names` are the proposers', by index."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.steps = 0
        self.rows = 0
        self.draft_ns = 0
        self.predicted = 0.0
        self.drafts: Counter[str] = Counter()
        self.draft_tokens: Counter[str] = Counter()
        self.accepted_tokens: Counter[str] = Counter()

    def sent(self, lengths: IntArray, owners: IntArray, path: FloatArray) -> None:
        """Drafts go out: int32[n] lengths, int32[n, k] who guessed each token, -1 for several, and P(accepted)."""
        out = np.arange(owners.shape[1]) < lengths[:, None]
        self.predicted += float(path[out].sum())
        for counter, guessed in ((self.drafts, owners[lengths > 0, 0]), (self.draft_tokens, owners[out])):
            for owner, count in enumerate(np.bincount(guessed + 1).tolist(), start=-1):
                if count:
                    counter[self._name(owner)] += count

    def scored(self, owners: Sequence[int]) -> None:
        """Guesses came true; `owners` as in `sent`."""
        for owner in owners:
            self.accepted_tokens[self._name(owner)] += 1

    def figures(self) -> dict[str, dict[tuple[str, ...], float]]:
        """By name and labels, as FIGURES lists them; guards know the faults."""
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


_counters: dict[str, Any] = {}
"""One of each per process: Prometheus refuses a second of one name."""


class Published:
    """One engine's figures as Prometheus counters: told what they are now, the counters move by the difference."""

    def __init__(self) -> None:
        from prometheus_client import Counter

        if not _counters:
            for name, (text, labels) in FIGURES.items():
                _counters[name] = Counter(f"specplug:{name}", text, labels)
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}

    def tell(self, figures: dict[str, dict[tuple[str, ...], float]]) -> None:
        for name, by_labels in figures.items():
            for labels, value in by_labels.items():
                more = value - self._told.get((name, labels), 0.0)
                if more > 0:
                    counter = _counters[name]
                    (counter.labels(*labels) if labels else counter).inc(more)
                    self._told[name, labels] = value


def read_back(folder: str) -> dict[str, float]:
    """The sums over all processes and labels of the counters in a multi-process folder, ours and vLLM's, by name."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    sums: dict[str, float] = {}
    for metric in MultiProcessCollector(CollectorRegistry(), path=folder).collect():
        if metric.type == "counter":
            sums[metric.name] = sum(sample.value for sample in metric.samples if sample.name.endswith("_total"))
    return sums


def _labelled(counts: Counter[str]) -> dict[tuple[str, ...], float]:
    return {(name,): float(count) for name, count in counts.items()}
