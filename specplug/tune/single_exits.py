"""The drafters that tune tries in place of one that chooses among several exits: each exit alone.

A replay needs what a drafter would have drafted everywhere, and one that changes has no single answer to that.
"""

from __future__ import annotations

from specplug.models import drafter_folders
from specplug.registry import ProposerSpec


def single_exits(drafter: ProposerSpec) -> list[ProposerSpec]:
    """One drafter for each exit; the drafter itself where it names one, or has none. UsageError where the folder cannot
    be read."""
    if drafter.method != "early_exit" or isinstance(drafter.options.get("exit"), int):
        return [drafter]
    manifest, _ = drafter_folders.read(drafter_folders.resolve(str(drafter.options["model"]), what="early-exit"))
    kept = {key: value for key, value in drafter.options.items() if key not in ("exit", "rule")}
    return [ProposerSpec(drafter.method, {**kept, "exit": one.layers}) for one in manifest.exits]
