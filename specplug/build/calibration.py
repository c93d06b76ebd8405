"""The material on which tokens are counted: what `--calibrate` names."""

from __future__ import annotations

from specplug.bench import workloads
from specplug.bench.workloads import Prompt
from specplug.build.frequencies import read_text
from specplug.machine.folders import expanded

SELF = "self"
"""The value of `--calibrate` that stands for the prompts of the built-in workload."""

COUNTED = ("target", "raw")
"""The values of `--from`: count the target's answers, or the text itself."""


def is_text(calibrate: str) -> bool:
    """Whether `--calibrate` names a text file, not prompts."""
    return calibrate != SELF and not calibrate.endswith(".jsonl")


def material(calibrate: str) -> list[str] | list[Prompt]:
    """What `--calibrate` names: pieces of text, or prompts."""
    if is_text(calibrate):
        return read_text(expanded(calibrate))
    return workloads.load_workload(workloads.BUILTIN if calibrate == SELF else calibrate, category="all")
