"""Opens the arms of a comparison on llama.cpp: one model with its measured cost curve, and every profile on it.

Reference engines open the same file again. The module does not depend on workloads, and writes only the head of the
document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np

from specplug import __version__
from specplug.bench.arms import Arm, ProfileArm, PromptLookupReference, plain
from specplug.bench.stage import Stage
from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.generation.answers import Sampling
from specplug.machine import fingerprint, hardware
from specplug.models import references
from specplug.profile import CostPoints, Profile

MEASURE_SECONDS = 12.0
"""Seconds for the cost curve of a comparison: every row count is timed in several rounds."""


@contextmanager
def llama_stage(
    profiles: Sequence[Profile],
    reference_engines: Sequence[str],
    sampling: Sampling,
    concurrency: int,
    notify: Callable[[str], None],
) -> Iterator[Stage]:
    """Open everything, and close it at the end."""
    if profiles[0].model is None:
        raise UsageError(f"profile {profiles[0].name}: no model; name one with --model")
    path = references.resolve(profiles[0].model)
    from specplug.engines.llama_cpp import require

    require()
    from specplug.engines.llama_cpp.measure import cost_points
    from specplug.engines.llama_cpp.model import open_model
    from specplug.engines.llama_cpp.rounding import explain
    from specplug.engines.llama_cpp.settings_choice import with_settings

    with ExitStack() as stack:
        model = stack.enter_context(open_model(path, profiles[0].runtime))
        first = with_settings(profiles[0], model, many=concurrency > 1, notify=notify)
        base = plain(first)
        for index, p in enumerate(profiles):
            changed = fingerprint.stale(p, path, p.runtime.threads or first.runtime.threads)
            if changed:
                notify(changed)
            if index and p.speculates and p.runtime != profiles[0].runtime:
                notify(f"profile {p.name}: runs with the engine settings of {profiles[0].name}, as all arms do")
        drafting = [replace(p, runtime=first.runtime) for p in profiles if p.speculates]
        cost = None
        if drafting:
            notify(f"measuring the cost of a pass on this machine (about {MEASURE_SECONDS:.0f} s)")
            limit = max(p.planner.max_nodes for p in drafting) + concurrency
            cost = cost_points(model, first.runtime, limit, seconds=MEASURE_SECONDS)
        ours = [
            ProfileArm(model, p, sampling, slots=concurrency, cost=_up_to(cost, p, concurrency))
            for p in (base, *drafting)
        ]
        plain_engine = ours[0].engine
        arms: list[Arm] = [*ours]
        arms += [PromptLookupReference(model, first, name, sampling) for name in reference_engines]
        for arm in arms:
            stack.callback(arm.close)

        def is_rounding(prompt: IntArray, plain: list[int], other: list[int]) -> bool:
            mismatch = explain(
                model,
                first.runtime,
                prompt,
                plain,
                other,
                sampling,
                padded=plain_engine.padded,
                shared_cache=concurrency > 1,
            )
            return mismatch is not None and mismatch.is_rounding

        yield Stage(
            arms,
            model.chat_prompt,
            model.text,
            is_rounding,
            {
                "model": f"{path.name} ({model.description})",
                "engine": "llama-cpp",
                "hardware": hardware.fingerprint() | {"threads": first.runtime.threads},
                "versions": {"specplug": __version__, "llama-cpp-python": version("llama-cpp-python")},
                "cost_curve": _curve(cost),
            },
        )


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
