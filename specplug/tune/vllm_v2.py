"""The tuning subject for vLLM's V2 runner, in which proposers draft on the device.

It measures steps with their drafting. Settings take turns on one engine: the proposers and what they learned are
exchanged in its workers, and the number of draft tokens in its scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from specplug import registry
from specplug.bench.arms import Arm, plain
from specplug.bench.vllm_stage import ScheduledArm
from specplug.engines.vllm.configure import PROVIDES, engine_settings, write_profile
from specplug.engines.vllm.measure import CONTEXTS, TimedPass, by_batch
from specplug.engines.vllm.v2.adaptive import is_adaptive
from specplug.engines.vllm.v2.device_forms import without_device_form
from specplug.engines.vllm.v2.timed_steps import steps_by_length
from specplug.errors import UsageError
from specplug.generation.answers import Sampling
from specplug.planning.batch_size_schedule import MOST_SEQUENCES
from specplug.profile import PlannerSettings, Profile
from specplug.registry import ProposerSpec
from specplug.tune.candidates import BUILTIN_METHOD, LONGEST, Setting, usable_methods
from specplug.tune.cost_curves import Progress
from specplug.tune.device_settings import EnginePlanning, device_grid
from specplug.tune.expense import Expense
from specplug.tune.prediction import Costs
from specplug.tune.trace import Trace
from specplug.tune.vllm import VllmSubject

ON_DEVICE = (ProposerSpec("suffix"), ProposerSpec("token_recycling"))
"""The proposers that draft while steps are timed."""


class V2Subject(VllmSubject):
    """A model that vLLM runs in its V2 runner with the engine settings of a profile."""

    def __init__(
        self,
        model: str,
        profile: Profile,
        *,
        named: Sequence[ProposerSpec] = (),
        most: int,
        notify: Callable[[str], None],
    ) -> None:
        """As for the V1 runner.

        named  further methods that are to be tried: they draft, too, while steps are timed
        """
        self.engine_planning = engine_planning(profile, notify)
        self._proposers = (*ON_DEVICE, *named)
        self._methods, on_host = methods_by_place()
        if on_host:
            notify(f"not tried, because it drafts on the host: {', '.join(on_host)} (runner: v1 in a profile tries it)")
        super().__init__(model, profile, most=most, notify=notify)

    def settings_to_try(self, most_nodes: int, named: Sequence[ProposerSpec]) -> list[Setting]:
        assert self.engine_planning is not None
        return device_grid([*self._methods, *named], self.engine_planning, min(most_nodes, LONGEST))

    def measure_expense(self, trace: Trace, methods: Sequence[ProposerSpec], level: int, seconds: float) -> Expense:
        """Nothing: the timed steps include drafting."""
        return Expense()

    def _timed(
        self, batches: Sequence[int], needed: Sequence[int], seconds: float, progress: Progress
    ) -> list[TimedPass]:
        """Steps of an engine that does not speculate, and of one with 1 to LONGEST draft tokens."""
        ref = write_profile(replace(self.profile, name="timed", proposers=self._proposers), self._folder)
        timed = steps_by_length(
            self._model,
            self._timing_settings(),
            ref,
            LONGEST,
            batches=batches,
            contexts=CONTEXTS,
            seconds=(seconds / (LONGEST + 1), seconds * LONGEST / (LONGEST + 1)),
            needed=needed,
            progress=progress,
        )
        if not by_batch(timed, CONTEXTS, LONGEST):
            raise UsageError(f"{self._model}: vLLM completed no run that could be timed; raise max_model_len")
        return timed

    def idle_arm(self, *, slots: int, costs: Costs) -> Arm | None:
        """The drafting engine with no draft tokens. None where vLLM's adaptive verification chooses their number: there
        settings are compared with plain decoding alone."""
        if self.engine_planning == "adaptive":
            return None
        return self._switched(_scheduled(self._profile_to_open(), [(1, MOST_SEQUENCES, 0)]))

    def _switched(self, profile: Profile) -> ScheduledArm:
        ref = write_profile(profile, self._folder)
        return ScheduledArm(
            profile.name, self._drafting_engine(), ref, Sampling(), lengths=profile.vllm.tokens_per_batch_size
        )

    def _profile_to_open(self) -> Profile:
        """A profile whose table has every number of draft tokens, 0 included: vLLM captures graphs for those alone."""
        profile = replace(self.profile, proposers=self._proposers, planner=PlannerSettings())
        every = [*((size, size, size) for size in range(1, LONGEST + 1)), (LONGEST + 1, MOST_SEQUENCES, 0)]
        return profile if self.engine_planning == "adaptive" else _scheduled(profile, every)


def engine_planning(profile: Profile, notify: Callable[[str], None]) -> EnginePlanning:
    """How vLLM chooses the draft tokens to verify with the engine settings of a profile."""
    drafting = replace(profile, proposers=ON_DEVICE, planner=PlannerSettings())
    adaptive = is_adaptive(drafting, engine_settings(plain(profile), ""), notify)
    return "adaptive" if adaptive else "batch_size"


def methods_by_place() -> tuple[list[ProposerSpec], list[str]]:
    """The methods that draft on the device, and the names of those that draft on the host only."""
    specs = [ProposerSpec(name) for name in usable_methods(PROVIDES) if name != BUILTIN_METHOD]
    on_host = without_device_form(registry.build_sources(specs))
    return [spec for spec in specs if spec.method not in on_host], on_host


def _scheduled(profile: Profile, lengths: Sequence[tuple[int, int, int]]) -> Profile:
    vllm = replace(profile.vllm, tokens_per_batch_size=tuple(lengths), adaptive_verification=False)
    return replace(profile, vllm=vllm)
