"""A whole comparison: opens the arms on an engine, runs them, writes the document.

Knows the document of `bench --json`. Knows no engine inside, and no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specplug.bench.arms import PEERS, Arm
from specplug.bench.interleaved import Explain, run_arms
from specplug.bench.workloads import Prompt, categories
from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.generation.answers import Sampling
from specplug.profile import Profile

Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """Arms on one engine, ready to run; `arms[0]` is plain decoding.

    about  of the document: model, engine, hardware, versions, cost_curve
    """

    arms: Sequence[Arm]
    encode: Callable[[Sequence[dict[str, str]]], IntArray]
    decode: Callable[[Sequence[int]], str]
    explain: Explain
    about: Mapping[str, Any]


def compare(
    profiles: Sequence[Profile],
    peers: Sequence[str],
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
    """The document of `bench --json` for these profiles and peers against plain decoding.

    All run the model of the first, with its engine settings, so that only the drafts differ.
    """
    check(profiles, peers, concurrency, temperature)
    sampling = Sampling(temperature=temperature, seed=seed)
    if profiles[0].engine == "vllm":
        from specplug.bench.vllm_stage import vllm_stage as open_stage
    else:
        from specplug.bench.llama_stage import llama_stage as open_stage
    with open_stage(profiles, peers, sampling, concurrency, notify) as stage:
        outcome = run_arms(
            stage.arms,
            prompts,
            stage.encode,
            stage.decode,
            stage.explain,
            max_tokens=max_tokens,
            repeats=repeats,
            concurrency=concurrency,
            progress=progress,
        )
    kinds = categories(prompts)
    about = dict(stage.about)
    curve = about.pop("cost_curve")
    return {
        "schema": 1,
        **about,
        "workload": {
            "name": workload,
            "prompts": len(prompts),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "repeats": repeats,
            "concurrency": concurrency,
        },
        "cost_curve": curve,
        "arms": [
            {"name": arm.name, "profile": arm.profile}
            | overall.figures()
            | {"categories": {kind: by_kind[kind].figures() for kind in kinds}}
            for arm, overall, by_kind in zip(stage.arms, outcome.overall, outcome.categories, strict=True)
        ],
    }


def check(profiles: Sequence[Profile], peers: Sequence[str], concurrency: int, temperature: float) -> None:
    """Raises what `compare` would raise before it opens anything."""
    engines = sorted({profile.engine for profile in profiles})
    if len(engines) > 1:
        raise UsageError(f"arms on {' and '.join(engines)}: one engine in a run; choose it with --engine")
    if peers and engines == ["vllm"]:
        raise UsageError(f"peer {peers[0]} is llama.cpp's; vLLM's own methods are profiles: vllm-builtin-ngram")
    names = [profile.name for profile in profiles] + list(peers)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"arm {twice[0]} is named twice; name it once")
    if any(profile.name == "none" and profile.speculates for profile in profiles):
        raise UsageError("profile none: drafts, but none is the name of plain decoding's arm; give it another name")
    if len({profile.exact for profile in profiles}) > 1:
        exact = next(profile.name for profile in profiles if profile.exact)
        raise UsageError(f"profile {exact}: exact changes plain decoding too; compare it in a run of its own")
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise UsageError(f"no peer is named {unknown[0]!r}; there are {', '.join(PEERS)}")
    if peers and concurrency > 1:
        raise UsageError(f"peer {peers[0]} answers one prompt at a time; use --concurrency 1")
    if peers and temperature > 0 and profiles[0].runtime.coupled:  # the first one's settings are those of all arms
        raise UsageError(f"profile {profiles[0].name}: no peer draws coupled; compare peers at temperature 0")
