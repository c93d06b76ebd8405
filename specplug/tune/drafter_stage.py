"""The stage of a tune that runs drafters over the recorded answers. It reaches the engine only through a subject."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specplug.profile.with_drafter import drafter_name
from specplug.registry import ProposerSpec
from specplug.tune.drafter_trace import DrafterTrace, drafter_key
from specplug.tune.exits import is_choosing
from specplug.tune.subject import Subject
from specplug.tune.trace import Trace


def trace_drafters(
    subject: Subject,
    drafters: Sequence[ProposerSpec],
    trace: Trace,
    level: int,
    seconds: float,
    *,
    report: Callable[[float], None],
    note: Callable[[str], None],
) -> dict[str, DrafterTrace]:
    """What each drafter drafts for the answers, by `drafter_key`; one that chooses among exits has their records.

    level    sequences at once for which its costs are measured
    seconds  for all drafters; one that does not read all answers in its share does not draft for the others
    report   receives the share of the stage that is done
    note     receives sentences for the user
    """
    found: dict[str, DrafterTrace] = {}
    drafters = [spec for spec in drafters if not is_choosing(spec)]
    for place, spec in enumerate(drafters):

        def progress(share: float, place: int = place) -> None:
            report((place + share) / len(drafters))

        traced = subject.trace_drafter(spec, trace.answers, level, seconds / len(drafters), progress)
        if len(traced.guesses) < len(trace.answers):
            note(
                f"{drafter_name(spec)}: {len(traced.guesses)} of {len(trace.answers)} answers were read, the budget "
                "allows no more; for the others it counts as not drafting"
            )
        found[drafter_key(spec)] = traced
    return found
