"""Names the files in the user's cache folder that hold what was measured with llama.cpp on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from specplug.machine import fingerprint, hardware
from specplug.machine.folders import cache_folder


def measurement_path(folder: str, model: Path, conditions: Sequence[object]) -> Path:
    """A JSON file in `folder` for what was measured of a model file under some conditions.

    Another processor or GPU, version of llama-cpp-python or file content gives another path; the file's name does not
    matter.

    conditions  values whose `repr` tells measurements apart, such as the version of a format and settings

    Raises SpecplugError where the model cannot be read, KeyError where there is no such file, and PackageNotFoundError
    without llama-cpp-python.
    """
    return measurement_paths(folder, model)(conditions)


def measurement_paths(folder: str, model: Path) -> Callable[[Sequence[object]], Path]:
    """`measurement_path` for one model; what it depends on besides the conditions is read only once, now."""
    identity = fingerprint.model_identity(model.absolute())
    file = {name: identity[name] for name in ("bytes", "sample_sha256")}
    machine, parent = _machine(), cache_folder() / folder

    def path(conditions: Sequence[object]) -> Path:
        everything = repr((*machine, file, tuple(conditions)))
        return parent / f"{hashlib.sha256(everything.encode()).hexdigest()[:24]}.json"

    return path


def machine_key() -> str:
    """Another processor or GPU, or version of llama-cpp-python, gives another text."""
    return hashlib.sha256(repr(_machine()).encode()).hexdigest()[:24]


def _machine() -> tuple[object, ...]:
    return hardware.fingerprint(), hardware.gpus(), version("llama-cpp-python")
