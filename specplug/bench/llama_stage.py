"""Opens the arms of a comparison on llama.cpp: one model, plain decoding under several engine settings, every profile.

Reference engines open the same file again. The module does not depend on workloads, and writes only the head of the
document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from specplug import __version__
from specplug.bench.arms import Arm, ProfileArm, PromptLookupReference, plain
from specplug.bench.plain_settings import best_plain_setting, llama_cpp_defaults, request_lengths
from specplug.bench.settings_gain import ArmSettings
from specplug.bench.stage import Stage
from specplug.core import IntArray
from specplug.engines.llama_cpp.settings_table import label
from specplug.errors import UsageError
from specplug.generation.answers import Sampling
from specplug.machine import fingerprint, hardware
from specplug.models import references
from specplug.profile import CostPoints, Profile, Runtime

MEASURE_SECONDS = 12.0
"""Seconds for the cost curve of a comparison: every row count is timed in several rounds."""

STOCK_NAME = "llama.cpp defaults"
"""The name of the arm without drafts under the settings that llama.cpp takes where none is named."""


@contextmanager
def llama_stage(
    profiles: Sequence[Profile],
    reference_engines: Sequence[str],
    sampling: Sampling,
    concurrency: int,
    notify: Callable[[str], None],
    conversations: Sequence[Sequence[str]],
    max_tokens: int,
) -> Iterator[Stage]:
    """Open everything, and close it at the end.

    The profiles run under the engine settings of the first one. The first arm is plain decoding under the settings that
    are best for it; arms without drafts follow for the profiles' settings and for llama.cpp's own, where they differ.

    conversations  the user's turns of the prompts to come
    max_tokens     new tokens of each answer
    """
    if profiles[0].model is None:
        raise UsageError(f"profile {profiles[0].name}: no model; name one with --model")
    path = references.resolve(profiles[0].model, "gguf")
    from specplug.engines.llama_cpp import require

    require()
    from specplug.engines.llama_cpp.drafters.head_finding import with_own_heads
    from specplug.engines.llama_cpp.drafters.opening import open_target
    from specplug.engines.llama_cpp.measure import LONGEST, cost_points
    from specplug.engines.llama_cpp.pass_costs import remember
    from specplug.engines.llama_cpp.rounding import explain
    from specplug.engines.llama_cpp.settings_choice import with_settings
    from specplug.engines.llama_cpp.state_memory import rollback_for

    profiles = [with_own_heads(profile, path) for profile in profiles]
    with ExitStack() as stack:
        model = stack.enter_context(open_target(path, profiles, profiles[0].runtime, notify))
        first = with_settings(profiles[0], model, many=concurrency > 1)
        runtimes = {"none": first.runtime}
        stock = llama_cpp_defaults(first.runtime)
        if not first.exact:
            lengths = request_lengths(conversations, model.chat_prompt, max_tokens)
            best, fits = best_plain_setting(
                model, first.runtime, lengths, max_tokens, many=concurrency > 1, notify=notify
            )
            runtimes = plain_arms(best, first.runtime, stock if fits else best)
            cores = hardware.usable_cores()
            if profiles[0].runtime.threads not in (None, cores):
                runtimes[f"none, {cores} threads"] = replace(best, threads=cores, threads_batch=None)
        for index, p in enumerate(profiles):
            changed = fingerprint.stale(p, path, p.runtime.threads or first.runtime.threads)
            if changed:
                notify(changed)
            if index and p.speculates and p.runtime != profiles[0].runtime:
                notify(f"profile {p.name}: runs with the engine settings of {profiles[0].name}, as all arms do")
        drafting = [replace(p, runtime=first.runtime) for p in profiles if p.speculates]
        cost = None
        if drafting:
            most = LONGEST * MEASURE_SECONDS
            notify(f"measuring the cost of a pass (about {MEASURE_SECONDS:.0f} s, {most:.0f} s where passes are slow)")
            limit = max(p.planner.max_nodes for p in drafting) + concurrency
            busy = hardware.busy_warning()
            snapshots = rollback_for(model, replace(drafting[0], exact=False), slots=concurrency).snapshots
            cost = cost_points(model, first.runtime, limit, seconds=MEASURE_SECONDS, snapshots=snapshots)
            if busy:
                notify(busy)
            else:
                remember(model, first.runtime, cost)
        arms: list[Arm] = []

        def add(arm: Arm) -> None:
            arms.append(arm)
            stack.callback(arm.close)

        padded = []
        for name, runtime in runtimes.items():
            arm = ProfileArm(model, plain(replace(first, runtime=runtime)), sampling, slots=concurrency, name=name)
            add(arm)
            padded.append(arm.engine.padded)
        for p in drafting:
            add(ProfileArm(model, p, sampling, slots=concurrency, cost=_up_to(cost, p, concurrency)))
        for name in reference_engines:
            add(PromptLookupReference(model, first, name, sampling))

        def is_rounding(reference: int, prompt: IntArray, plain: list[int], other: list[int]) -> bool:
            mismatch = explain(
                model,
                plain_runtimes[reference],
                prompt,
                plain,
                other,
                sampling,
                padded=padded[reference],
                shared_cache=concurrency > 1,
            )
            return mismatch is not None and mismatch.is_rounding

        plain_runtimes = list(runtimes.values())
        plain_labels = [
            label(one) if one.threads == first.runtime.threads else f"{label(one)}, {one.threads} threads"
            for one in plain_runtimes
        ]
        own = plain_labels.index(label(first.runtime))
        reference_of = [*range(len(plain_labels)), *[own] * (len(arms) - len(plain_labels))]
        yield Stage(
            arms,
            model.chat_prompt,
            model.text,
            [partial(is_rounding, reference) for reference in reference_of],
            {
                "model": f"{path.name} ({model.description})",
                "engine": "llama-cpp",
                "hardware": hardware.fingerprint() | {"threads": first.runtime.threads},
                "versions": {"specplug": __version__, "llama-cpp-python": version("llama-cpp-python")},
                "cost_curve": _curve(cost),
            },
            reference_of,
            ArmSettings(
                [plain_labels[reference] for reference in reference_of],
                profiles=own,
                stock=plain_labels.index(label(stock)) if label(stock) in plain_labels else None,
                stock_label=label(stock),
            ),
        )


def plain_arms(best: Runtime, own: Runtime, stock: Runtime) -> dict[str, Runtime]:
    """The settings of the arms without drafts, by name: the best one first, and the others where they differ."""
    arms = {"none": best}
    if label(own) != label(best):
        arms[f"none, {label(own)}"] = own
    if label(stock) not in map(label, arms.values()):
        arms[STOCK_NAME] = stock
    return arms


def _up_to(cost: CostPoints | None, profile: Profile, concurrency: int) -> CostPoints | None:
    """The part of the cost curve within a profile's own limit on rows; the cost at the limit is interpolated."""
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
