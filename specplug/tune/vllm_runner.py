"""Opens the subject of tuning for the model runner that vLLM uses for a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from specplug.bench.arms import plain
from specplug.engines.vllm.configure import engine_settings
from specplug.engines.vllm.environment import quiet
from specplug.engines.vllm.located_model import located_model
from specplug.engines.vllm.runner_choice import runs_on_v2
from specplug.engines.vllm.versions import require
from specplug.profile import Profile
from specplug.registry import ProposerSpec
from specplug.tune.vllm import VllmSubject
from specplug.tune.vllm_v2 import ON_DEVICE, V2Subject


@quiet()
def vllm_subject(
    model: str, profile: Profile, *, named: Sequence[ProposerSpec], most: int, notify: Callable[[str], None]
) -> VllmSubject:
    """At most `most` sequences run at once. EngineError without vLLM; UsageError for settings that vLLM refuses.

    named  further methods that are to be tried
    """
    require()
    drafting = replace(profile, proposers=(*ON_DEVICE, *named))
    v2 = runs_on_v2(drafting, str(located_model(model)), engine_settings(plain(profile), ""), notify=notify)
    profile = replace(profile, vllm=replace(profile.vllm, runner="v2" if v2 else "v1"))
    return (V2Subject if v2 else VllmSubject)(model, profile, most=most, notify=notify)
