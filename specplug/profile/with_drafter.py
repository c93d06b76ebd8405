"""Adds a drafter to a profile. This module edits a profile, and opens nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from specplug.profile.settings import Profile
from specplug.registry import ProposerSpec

BUILT = ("vocab_trim", "early_exit")
"""The methods that name a folder that `specplug build` wrote."""

HEADS = ("mtp", "eagle3")
"""The methods that draft with a head that reads the target's hidden states."""

DRAFTERS = ("draft_model", *BUILT, "short_context", *HEADS)
"""The methods that draft with a model, or with a head."""


def with_drafter(profile: Profile, drafter: ProposerSpec, *, name: str | None = None) -> Profile:
    """The profile with a drafter, in place of the one that it has, and beside its other methods.

    vLLM runs one drafter alone, so there it replaces all methods.

    name  of the new profile; the old one's where None
    """
    others = [one for one in profile.proposers if one.method not in ("none", "builtin", *DRAFTERS)]
    proposers = (drafter,) if profile.engine == "vllm" else (*others, drafter)
    return replace(profile, name=name or profile.name, proposers=proposers)


def drafters_of(proposers: Iterable[ProposerSpec]) -> list[ProposerSpec]:
    """Those proposers that draft with a model."""
    return [spec for spec in proposers if spec.method in DRAFTERS]


def reads_prompts(profile: Profile) -> bool:
    """Whether every prompt has to be read where the profile drafts: a head needs the hidden states of its tokens, which
    a saved KV cache does not have."""
    return any(spec.method in HEADS for spec in profile.proposers)


NAMED_OPTIONS = ("head", "exit", "rule", "first", "recent", "retrieved", "chunk")
"""The options in the name of a drafter: with others of them, one model is another drafter."""


def drafter_name(spec: ProposerSpec) -> str:
    """Words for a drafter: the file of its model, or the method of one that has no model of its own, and the options by
    which several drafters of one model differ, such as its exit."""
    name = Path(str(spec.options["model"])).name if "model" in spec.options else spec.method
    named = (f"{key} {short_option(key, spec.options[key])}" for key in NAMED_OPTIONS if key in spec.options)
    return ", ".join([name, *named])


def short_option(key: str, value: Any) -> Any:
    """An option of a drafter in a name: of a path only the file."""
    return Path(str(value)).name if key in ("model", "head") else value
