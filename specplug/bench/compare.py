"""Compares profiles with plain decoding: opens the arms, runs them, and builds the document of `bench --json`.

This is the one place that chooses between the engines. It does not depend on their internals or on a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from specplug.bench.arms import REFERENCE_ENGINES
from specplug.bench.interleaved import run_arms
from specplug.bench.settings_gain import settings_document
from specplug.bench.stage import Stage
from specplug.bench.workloads import Prompt, categories
from specplug.errors import UsageError
from specplug.generation.answers import Sampling
from specplug.profile import Profile, for_own_engine

Progress = Callable[[str, int], None]


def compare(
    profiles: Sequence[Profile],
    reference_engines: Sequence[str],
    prompts: Sequence[Prompt],
    *,
    workload: str,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    repeats: int = 1,
    concurrency: int = 1,
    notify: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda what, steps: None,
) -> dict[str, Any]:
    """The document of `bench --json` for these profiles and reference engines against plain decoding.

    All arms run the model of the first profile with its engine settings, so that only the drafts differ. On llama.cpp
    the first arm is plain decoding under the settings that are best for it, and further arms without drafts show what
    other settings give.
    """
    check(profiles, reference_engines, concurrency, temperature)
    sampling = Sampling(temperature=temperature, seed=seed)
    conversations = [prompt.turns for prompt in prompts]
    with open_stage(profiles, reference_engines, sampling, concurrency, notify, conversations, max_tokens) as stage:
        outcome = run_arms(
            stage.arms,
            prompts,
            stage.encode,
            stage.decode,
            stage.explain,
            references=stage.references,
            max_tokens=max_tokens,
            repeats=repeats,
            concurrency=concurrency,
            progress=progress,
        )
    names = categories(prompts)
    about = dict(stage.about)
    curve = about.pop("cost_curve")
    references = stage.references or [0] * len(stage.arms)
    labels = stage.settings.labels if stage.settings else [None] * len(stage.arms)
    return {
        "schema": 1,
        **about,
        "workload": workload_document(workload, prompts, max_tokens, temperature, repeats, concurrency),
        "cost_curve": curve,
        "engine_settings": settings_document(stage.settings, stage.arms, outcome.overall) if stage.settings else None,
        "arms": [
            {
                "name": arm.name,
                "profile": arm.profile,
                "engine_settings": label,
                "reference": stage.arms[reference].name,
            }
            | overall.figures()
            | {"categories": {name: by_category[name].figures() for name in names}}
            for arm, label, reference, overall, by_category in zip(
                stage.arms, labels, references, outcome.overall, outcome.categories, strict=True
            )
        ],
    }


def workload_document(
    name: str, prompts: Sequence[Prompt], max_tokens: int, temperature: float, repeats: int, concurrency: int
) -> dict[str, Any]:
    """What was asked, for the document of `bench --json`."""
    return {
        "name": name,
        "prompts": len(prompts),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "repeats": repeats,
        "concurrency": concurrency,
    }


def check(profiles: Sequence[Profile], reference_engines: Sequence[str], concurrency: int, temperature: float) -> None:
    """Raise the UsageError that `compare` would raise before it opens anything."""
    engines = sorted({for_own_engine(profile).engine for profile in profiles})
    if len(engines) > 1:
        raise UsageError(f"arms on {' and '.join(engines)}: a run compares on one engine; choose it with --engine")
    if reference_engines and engines == ["vllm"]:
        raise UsageError(
            f"--peer {reference_engines[0]}: runs on llama.cpp only; "
            "for vLLM's own methods use a profile such as vllm-builtin-ngram"
        )
    names = [profile.name for profile in profiles] + list(reference_engines)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"arm {twice[0]} is named twice; name it once")
    if any(profile.name == "none" and profile.speculates for profile in profiles):
        raise UsageError(
            "profile none: it drafts, but the name none is reserved for plain decoding; rename the profile"
        )
    if len({profile.exact for profile in profiles}) > 1:
        exact = next(profile.name for profile in profiles if profile.exact)
        raise UsageError(f"profile {exact}: exact changes plain decoding too; compare it in a separate run")
    unknown = [name for name in reference_engines if name not in REFERENCE_ENGINES]
    if unknown:
        raise UsageError(f"--peer {unknown[0]!r}: unknown; use one of {', '.join(REFERENCE_ENGINES)}")
    if reference_engines and concurrency > 1:
        raise UsageError(f"--peer {reference_engines[0]}: answers one prompt at a time; use --concurrency 1")
    # All arms that draft run with the first profile's settings.
    if reference_engines and temperature > 0 and profiles[0].runtime.coupled:
        raise UsageError(
            f"profile {profiles[0].name}: --peer {reference_engines[0]} has no coupled sampling; use --temperature 0"
        )


def open_stage(
    profiles: Sequence[Profile],
    reference_engines: Sequence[str],
    sampling: Sampling,
    concurrency: int,
    notify: Callable[[str], None],
    conversations: Sequence[Sequence[str]],
    max_tokens: int,
) -> AbstractContextManager[Stage]:
    """The arms of a comparison on the engine of the profiles, of which only that engine is imported.

    conversations, max_tokens  the user's turns to come, and the new tokens of each answer
    """
    if profiles[0].engine == "vllm":
        from specplug.bench.vllm_stage import vllm_stage

        return vllm_stage(profiles, sampling, concurrency, notify)
    from specplug.bench.llama_stage import llama_stage

    return llama_stage(profiles, reference_engines, sampling, concurrency, notify, conversations, max_tokens)
