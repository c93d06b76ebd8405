"""Chooses the model runner of vLLM in which a tune measures, and what is tried there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from specplug.bench.arms import plain
from specplug.engines.vllm.configure import PROVIDES, engine_settings
from specplug.engines.vllm.environment import quiet
from specplug.engines.vllm.located_model import located_model
from specplug.engines.vllm.runner_choice import runs_on_v2
from specplug.engines.vllm.versions import require
from specplug.profile import Profile
from specplug.registry import ProposerSpec
from specplug.tune.candidates import LONGEST, Setting, grid
from specplug.tune.device_settings import device_grid
from specplug.tune.vllm import VllmSubject
from specplug.tune.vllm_v2 import ON_DEVICE, V2Subject, engine_planning, methods_by_place


@quiet()
def vllm_subject(
    model: str, profile: Profile, *, named: Sequence[ProposerSpec], most: int, notify: Callable[[str], None]
) -> VllmSubject:
    """At most `most` sequences run at once. EngineError without vLLM; UsageError for settings that vLLM refuses.

    named  further methods that are to be tried
    """
    v2 = _on_v2(model, profile, named, notify)
    profile = replace(profile, vllm=replace(profile.vllm, runner="v2" if v2 else "v1"))
    if v2:
        return V2Subject(model, profile, named=named, most=most, notify=notify)
    return VllmSubject(model, profile, most=most, notify=notify)


@quiet()
def vllm_settings(model: str, profile: Profile, *, named: Sequence[ProposerSpec]) -> list[Setting]:
    """The settings that a tune would try, without starting vLLM. Errors as for `vllm_subject`."""

    def say_nothing(text: str) -> None:
        """The tune itself will say it."""

    if _on_v2(model, profile, named, say_nothing):
        return device_grid([*methods_by_place()[0], *named], engine_planning(profile, say_nothing), LONGEST)
    return grid(PROVIDES, trees=False, most_nodes=LONGEST, named=named)


def _on_v2(model: str, profile: Profile, named: Sequence[ProposerSpec], notify: Callable[[str], None]) -> bool:
    require()
    drafting = replace(profile, proposers=(*ON_DEVICE, *named))
    return runs_on_v2(drafting, str(located_model(model)), engine_settings(plain(profile), ""), notify=notify)
