"""Which drafters are tried on recorded answers: those that the user named, and the model itself on long texts.

Depends on the lengths of texts and on the options of methods, not on an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from specplug import registry
from specplug.drafts.retrieval import Window
from specplug.profile.with_drafter import drafter_name
from specplug.registry import ProposerSpec
from specplug.tune.trace import Answer

LONG = 2
"""A text of so many windows is long: the model drafts for itself from half of it at most. Chosen."""


def drafters_to_try(
    named: Sequence[ProposerSpec], own: Sequence[ProposerSpec], answers: Sequence[Answer], context: int
) -> tuple[list[ProposerSpec], list[str]]:
    """The drafters, and a sentence on each named one that is left out.

    own      those that need no model beside the target's
    context  tokens of a sequence at most
    """
    tried, notes = [], []
    length = median(len(answer.prompt) for answer in answers) if answers else 0
    for spec in named:
        window = _window(spec)
        if "model" not in spec.options and window is not None and window.size >= context:
            notes.append(f"{drafter_name(spec)} is not tried: no text is longer than the {window.size} tokens it keeps")
        else:
            tried.append(spec)
    for spec in own:
        window = _window(spec)
        if window is not None and length >= LONG * window.size and all(spec.method != one.method for one in named):
            tried.append(spec)
    return tried, notes


def _window(spec: ProposerSpec) -> Window | None:
    (source,) = registry.build_sources([spec])
    window = getattr(source, "window", None)
    return window if isinstance(window, Window) else None
