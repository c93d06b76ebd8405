"""A profile that drafts on the device, with what it has learned and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specplug.core import Proposer
from specplug.engines.vllm.draft_counters import AGREED, PrometheusCounters
from specplug.engines.vllm.fault_isolation import MAX_FAULTS, Faults
from specplug.engines.vllm.v2.device_counters import DeviceCounters
from specplug.engines.vllm.v2.device_drafting import DeviceDrafting
from specplug.engines.vllm.v2.model_proposer import ModelProposer
from specplug.profile import Profile

METRICS = "metrics"
"""The name under which faults of publishing are counted, beside those of proposers."""


@dataclass(slots=True)
class LoadedProfile:
    """The state of drafting with one profile.

    profile   what was loaded
    sources   its proposers in the form for the host
    drafting  None on ranks that receive their draft tokens
    invalid   per proposer, invalid chains up to the last update
    """

    profile: Profile
    sources: Sequence[Proposer]
    drafting: DeviceDrafting | None
    faults: Faults
    counters: DeviceCounters = field(default_factory=DeviceCounters)
    published: PrometheusCounters | None = None
    steps: int = 0
    invalid: list[int] = field(default_factory=list)

    def publish(self) -> None:
        """Update the engine's metrics by what has arrived on the host, and count invalid chains as faults.

        An exception is recorded only: it is of this rank alone, and the others would wait for one that drafts no more.
        """
        if METRICS in self.faults.disabled:
            return
        try:
            self._publish()
        except Exception as error:
            self.faults.record(METRICS, "raised", f"{type(error).__name__}: {error}")

    def _publish(self) -> None:
        drafting, faults = self.drafting, self.faults
        assert drafting is not None
        values = self.counters.poll(
            {
                "drafted": drafting.drafted,
                "accepted": drafting.accepted,
                "predicted": drafting.predicted,
                "invalid": drafting.invalid,
            }
        )
        if values is None:
            return
        before = self.invalid or [0] * len(drafting.names)
        for index, (number, known) in enumerate(zip(values["invalid"], before, strict=True)):
            name, runs_target = drafting.names[index], isinstance(drafting.proposers[index], ModelProposer)
            # A proposer that this rank alone turned off would leave the others waiting for its layers.
            for _ in range(0 if drafting.raises and runs_target else min(number - known, MAX_FAULTS)):
                faults.record(name, "drafted nonsense", "an id outside the vocabulary, or an unknown bucket")
        self.invalid = values["invalid"]
        labels = [(name,) for name in (*drafting.names, AGREED)]
        if self.published is None:
            self.published = PrometheusCounters()
        for one in drafting.proposers:
            if isinstance(one, ModelProposer):
                self.published.update(one.values())
        self.published.update(
            {
                "steps": {(): float(self.steps)},
                "draft_tokens": dict(zip(labels, map(float, values["drafted"]), strict=True)),
                "accepted_tokens": dict(zip(labels, map(float, values["accepted"]), strict=True)),
                "predicted_tokens": {(): values["predicted"]},
                "guard_trips": {names: float(count) for names, count in faults.counts.items()},
                "proposers_off": {(name,): 1.0 for name in faults.disabled},
            }
        )
