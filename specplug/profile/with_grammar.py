"""Adds the method for requests with a constraint to a profile, and takes it out where the engine has no use for it."""

from __future__ import annotations

from dataclasses import replace

from specplug.profile.settings import Profile
from specplug.registry import ProposerSpec

GRAMMAR = "grammar"
"""The method that needs the constraints of requests, which vLLM keeps in its scheduler."""


def with_grammar(profile: Profile) -> Profile:
    """The profile with the method beside its others; plain decoding and profiles for vLLM stay as they are.

    It drafts nothing for requests without a constraint, and costs them nothing.
    """
    if not profile.speculates or profile.engine == "vllm" or any(one.method == GRAMMAR for one in profile.proposers):
        return profile
    return replace(profile, proposers=(*profile.proposers, ProposerSpec(GRAMMAR)))


def for_engine(profile: Profile, engine: str) -> Profile:
    """The profile on another engine: on vLLM without this method, unless it has no other."""
    others = tuple(spec for spec in profile.proposers if spec.method != GRAMMAR)
    if engine == "vllm" and profile.engine != engine and others:
        profile = replace(profile, proposers=others)
    return replace(profile, engine=engine)
