"""A whole comparison on llama.cpp: opens the model, measures its cost, runs the arms, writes the document.

Knows the engine and the document of `bench --json`. Knows no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from specplug import __version__, fingerprint, hardware
from specplug.bench.arms import PEERS, Arm, ProfileArm, PromptLookupPeer, plain
from specplug.bench.run import run_arms
from specplug.bench.workloads import Prompt, categories
from specplug.core import IntArray
from specplug.errors import EngineError, UsageError
from specplug.profile import CostPoints, Profile

Progress = Callable[[str, int], None]

MEASURE_SECONDS = 12.0
"""Time for the cost curve of a comparison: every row count, several rounds."""


def compare(
    model_path: Path,
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
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int], None] = lambda what, steps: None,
) -> dict[str, Any]:
    """The document of `bench --json` for these profiles and peers against plain decoding.

    All profiles run with the engine settings of the first, so that only the drafts differ.
    """
    check(profiles, peers, concurrency)
    from specplug.engines.llama_cpp import require

    require()
    from specplug.engines.llama_cpp.engine import resolved
    from specplug.engines.llama_cpp.measure import cost_points
    from specplug.engines.llama_cpp.model import open_model
    from specplug.engines.llama_cpp.rounding import explain
    from specplug.engines.llama_cpp.sampling import Sampling

    sampling = Sampling(temperature=temperature, seed=seed)
    with ExitStack() as stack:
        model = stack.enter_context(open_model(model_path, gpu_layers=profiles[0].runtime.gpu_layers))
        first = resolved(profiles[0], model)
        base = plain(first)
        for place, p in enumerate(profiles):
            changed = fingerprint.stale(p, model_path, p.runtime.threads or first.runtime.threads)
            if changed:
                say(changed)
            if place and p.speculates and p.runtime != profiles[0].runtime:
                say(f"profile {p.name}: runs with the engine settings of {profiles[0].name}, as every arm does")
        drafting = [replace(p, runtime=first.runtime) for p in profiles if p.speculates]
        cost = None
        if drafting:
            say(f"measuring what a pass costs here (about {MEASURE_SECONDS:.0f} s)")
            limit = max(p.planner.max_nodes for p in drafting) + concurrency
            cost = cost_points(model, first.runtime, limit, seconds=MEASURE_SECONDS)
        ours = [
            ProfileArm(model, p, sampling, slots=concurrency, cost=_up_to(cost, p, concurrency))
            for p in (base, *drafting)
        ]
        plainly = ours[0].engine
        arms: list[Arm] = [*ours]
        arms += [PromptLookupPeer(model, first, name, sampling) for name in peers]
        for arm in arms:
            stack.callback(arm.close)

        def is_rounding(prompt: IntArray, one: list[int], other: list[int]) -> bool:
            found = explain(
                model, first.runtime, prompt, one, other, sampling, padded=plainly.padded, holes=concurrency > 1
            )
            return found is not None and found.is_rounding

        outcome = run_arms(
            arms,
            prompts,
            model.chat_prompt,
            model.text,
            is_rounding,
            max_tokens=max_tokens,
            repeats=repeats,
            concurrency=concurrency,
            progress=progress,
        )
        description = model.description
    kinds = categories(prompts)
    return {
        "schema": 1,
        "model": f"{model_path.name} ({description})",
        "engine": "llama-cpp",
        "hardware": hardware.fingerprint() | {"threads": first.runtime.threads},
        "versions": {"specplug": __version__, "llama-cpp-python": version("llama-cpp-python")},
        "workload": {
            "name": workload,
            "prompts": len(prompts),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "repeats": repeats,
            "concurrency": concurrency,
        },
        "cost_curve": _curve(cost),
        "arms": [
            {"name": arm.name, "profile": arm.profile}
            | overall.figures()
            | {"categories": {kind: by_kind[kind].figures() for kind in kinds}}
            for arm, overall, by_kind in zip(arms, outcome.overall, outcome.categories, strict=True)
        ],
    }


def check(profiles: Sequence[Profile], peers: Sequence[str], concurrency: int) -> None:
    """Raises what `compare` would raise before it opens anything."""
    for profile in profiles:
        if profile.engine != "llama-cpp":
            raise EngineError(f"profile {profile.name}: bench cannot run engine {profile.engine} yet; use llama-cpp")
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


def _up_to(cost: CostPoints | None, profile: Profile, concurrency: int) -> CostPoints | None:
    """The part of the curve that a profile's own limit on rows allows."""
    if cost is None:
        return None
    limit = profile.planner.max_nodes + concurrency
    rows = (*(n for n in cost.rows if n < limit), limit)
    ms = tuple(tuple(np.interp(rows, cost.rows, line).tolist()) for line in cost.ms)
    return CostPoints(cost.contexts, rows, ms)


def _curve(cost: CostPoints | None) -> dict[str, Any]:
    if cost is None:
        return {"rows": [], "ms": []}
    return {
        "rows": list(cost.rows),
        "ms": list(cost.ms[0]),
        "context": cost.contexts[0],
        "contexts": {str(fill): list(line) for fill, line in zip(cost.contexts, cost.ms, strict=True)},
    }
