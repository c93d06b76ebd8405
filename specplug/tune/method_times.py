"""Times the steps of llama.cpp's loop with one method, for what drafting costs beside the target's passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING, Any, cast

from specplug import registry
from specplug.core import IntArray
from specplug.profile import CostPoints, PlannerSettings, Profile
from specplug.registry import ProposerSpec
from specplug.tune.expense import TimedProposer

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.model import Model

SIZES = (2, 4, 8)
"""Sizes, in tokens, of the drafts with which a method's own cost is measured."""

SAMPLES = 18
"""Fewest timed passes per method, whatever the time."""


@dataclass(slots=True)
class StepTimes:
    """Microseconds (us) of steps with one method.

    reads_rows  whether the method reads top ids
    proposed    (draft tokens, us) of each `propose`
    observed    (emitted tokens, us) of each `observe`
    plan        (draft tokens, rows, us) of everything else that counts as drafting, in each step
    loop        (rows, us) of everything that is neither drafting nor a target pass, in each step
    """

    reads_rows: bool
    proposed: list[tuple[int, float]] = field(default_factory=list)
    observed: list[tuple[int, float]] = field(default_factory=list)
    plan: list[tuple[int, int, float]] = field(default_factory=list)
    loop: list[tuple[int, float]] = field(default_factory=list)


def timed_steps(
    model: Model, profile: Profile, prompts: Sequence[IntArray], spec: ProposerSpec, seconds: float
) -> StepTimes:
    """Time passes of the step loop with drafts of SIZES in turn, under costs with which every draft is verified."""
    from specplug.engines.llama_cpp.engine import LlamaCpp
    from specplug.generation.answers import Answer as Generated
    from specplug.generation.answers import Request

    specs = (spec,)
    profile = replace(profile, proposers=specs, planner=PlannerSettings(max_nodes=max(SIZES)), exact=False)
    free = CostPoints((1,), (1, max(SIZES) + 2), ((1000.0, 1000.1),))
    (source,) = registry.build_sources(specs)
    timed = TimedProposer(source, SIZES)
    times = StepTimes(reads_rows=source.requires.topk > 0)
    began = perf_counter()
    with LlamaCpp(model, profile, cost=free) as engine:
        engine.reset([timed])
        for prompt in prompts:
            answer = Generated()
            stream = cast(Any, engine.stream(Request(prompt, 64), answer))
            next(stream)
            drafts, before, at = len(timed.proposed), replace(answer.counters), perf_counter_ns()
            for _ in stream:
                now = perf_counter_ns()
                target_us = (answer.counters.target_ns - before.target_ns) / 1000
                draft_us = (answer.counters.draft_ns - before.draft_ns) / 1000
                rows = 1 + answer.counters.draft_tokens - before.draft_tokens
                times.loop.append((rows, (now - at) / 1000 - target_us - draft_us))
                if len(timed.proposed) > drafts:
                    nodes, propose_us = timed.proposed[-1]
                    times.plan.append((nodes, rows, draft_us - propose_us - timed.observed[-1][1]))
                drafts, before, at = len(timed.proposed), replace(answer.counters), perf_counter_ns()
                if len(times.loop) >= SAMPLES and perf_counter() - began > seconds:
                    break
            stream.close()
            if len(times.loop) >= SAMPLES and perf_counter() - began > seconds:
                break
    times.proposed, times.observed = timed.proposed[2:], timed.observed[2:]
    return times
