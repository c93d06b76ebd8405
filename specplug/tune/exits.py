"""The drafters that tune tries where one chooses among several exits: each exit alone, and both rules of choosing.

What a drafter would have drafted everywhere is recorded of each exit alone; a replay of one that chooses draws on these
records. Depends on options, on the folder of the exits and on recorded drafters, not on an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from specplug.core import Step
from specplug.models import drafter_folders
from specplug.planning.choosing_drafter import ChoosingDrafter
from specplug.planning.exit_choice import LAYER_LIMIT
from specplug.registry import ProposerSpec
from specplug.tune.drafter_trace import DrafterTrace, RecordedDrafter, drafter_key

METHOD = "early_exit"

SCORED_EVERY = 8
"""Steps of a replay, of all sequences together, in one of which all exits are scored. Chosen."""


def exits_to_try(drafter: ProposerSpec, target: Path) -> list[ProposerSpec]:
    """Each exit alone; where there are several, also the choice by measured time, and the rule of DEL with its longest
    drafts. The drafter itself where it names an exit, or has none, or where its exits are layers of vLLM's target.

    target  the model, a GGUF file
    UsageError where the folder cannot be read.
    """
    if not is_choosing(drafter) or "model" not in drafter.options:
        return [drafter]
    folder = drafter_folders.resolve_exits(str(drafter.options["model"]), target)
    manifest, _ = drafter_folders.read(folder)
    kept = {key: value for key, value in drafter.options.items() if key not in ("exit", "rule")}
    single = [ProposerSpec(METHOD, {**kept, "exit": one.layers}) for one in manifest.exits]
    by_layers = ProposerSpec(METHOD, {**kept, "rule": "layers", "max_draft": LAYER_LIMIT})
    return [*single, ProposerSpec(METHOD, kept), by_layers] if len(single) > 1 else single


def is_choosing(spec: ProposerSpec) -> bool:
    """Whether a drafter chooses among several exits, so that it is not recorded itself."""
    return spec.method == METHOD and not isinstance(spec.options.get("exit"), int)


def chooses_by_layers(spec: ProposerSpec) -> bool:
    """Whether it follows the rule of DEL, whose drafts are always verified."""
    return spec.method == METHOD and spec.options.get("rule") == "layers"


def recorded_for(spec: ProposerSpec, recorded: Mapping[str, DrafterTrace]) -> list[DrafterTrace]:
    """The record of a drafter, or those of the exits among which it chooses; empty where there is none."""
    if is_choosing(spec):
        folder = spec.options.get("model")
        own = [one for one in recorded.values() if one.exit is not None and one.exit.folder == folder]
        longest = spec.options.get("max_draft")
        own = own if longest is None else [replace(one, max_draft=longest) for one in own]
        return sorted(own, key=_layers)
    found = recorded.get(drafter_key(spec))
    return [] if found is None else [found]


class RecordedExits(ChoosingDrafter[RecordedDrafter]):
    """Drafts with one of several recorded exits, or with none. Every few steps all exits are scored, as they are live
    by the hidden states of the target; what that costs, which is little, is left out."""

    def __init__(
        self, recorded: Sequence[DrafterTrace], drafters: Sequence[RecordedDrafter], *, by_layers: bool
    ) -> None:
        """
        recorded   those of the exits, ascending by layers
        by_layers  as in `ChoosingDrafter`
        """
        exits = [one.exit for one in recorded if one.exit is not None]
        super().__init__([one.layers for one in exits], drafters, total=exits[0].total, by_layers=by_layers)
        self.scored_beside = True
        self._observed = 0

    def observe(self, seq: int, step: Step) -> None:
        if self._observed % SCORED_EVERY == 0:
            for index, drafter in enumerate(self.drafters):
                self.learn_shadow(index, *drafter.scores(seq, step.emitted))
            self.choose()
        self._observed += 1
        super().observe(seq, step)


def _layers(trace: DrafterTrace) -> int:
    assert trace.exit is not None
    return trace.exit.layers
