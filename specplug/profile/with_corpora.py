"""Adds corpora to a profile. This module edits a profile, and opens nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from specplug.profile.settings import Profile
from specplug.profile.with_drafter import DRAFTERS
from specplug.registry import ProposerSpec

DATASTORE = "datastore"
"""The method that drafts from corpora."""


def with_corpora(profile: Profile, corpora: Sequence[str], *, name: str | None = None) -> Profile:
    """The profile with these corpora, in place of those that it has, and beside its other methods.

    A method of vLLM's own works alone, and so does a drafter on vLLM: corpora replace them.

    name  of the new profile; the old one's where None
    """
    left_out = (DATASTORE, *_works_alone(profile))
    others = [one for one in profile.proposers if one.method not in left_out]
    return replace(profile, name=name or profile.name, proposers=(*others, datastore_spec(profile, corpora)))


def may_add_corpora(profile: Profile) -> bool:
    """Whether corpora can be added without replacing another method."""
    return not any(spec.method in _works_alone(profile) for spec in profile.proposers)


def for_one_user(profile: Profile) -> Profile:
    """The profile for a command with one user, who drafts from all corpora, whatever requests to a server may name."""
    keys = ("corpora_for", "request_corpora")
    proposers = tuple(
        replace(spec, options={key: value for key, value in spec.options.items() if key not in keys})
        if spec.method == DATASTORE
        else spec
        for spec in profile.proposers
    )
    return replace(profile, proposers=proposers)


def datastore_spec(profile: Profile, corpora: Sequence[str]) -> ProposerSpec:
    """The method for these corpora, with the options that the profile sets."""
    known = next((spec for spec in profile.proposers if spec.method == DATASTORE), ProposerSpec(DATASTORE))
    return ProposerSpec(DATASTORE, {**known.options, "corpora": list(corpora)})


def corpora_of(profile: Profile) -> list[str]:
    """The corpora that a profile names."""
    return [ref for spec in profile.proposers if spec.method == DATASTORE for ref in spec.options.get("corpora", ())]


def _works_alone(profile: Profile) -> tuple[str, ...]:
    """Methods that corpora replace."""
    return ("none", "builtin", *(DRAFTERS if profile.engine == "vllm" else ()))
