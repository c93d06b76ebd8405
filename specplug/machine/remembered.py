"""Names the files in the user's cache folder that hold what was measured with llama.cpp on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from platformdirs import user_cache_dir

from specplug.machine import fingerprint, hardware


def measurement_path(folder: str, model: Path, conditions: Sequence[object]) -> Path:
    """A JSON file in `folder` for what was measured of a model file under some conditions.

    Another processor or GPU, version of llama-cpp-python or file content gives another path; the file's name does not
    matter.

    conditions  values whose `repr` tells measurements apart, such as the version of a format and settings

    Raises SpecplugError where the model cannot be read, KeyError where there is no such file, and PackageNotFoundError
    without llama-cpp-python.
    """
    identity = fingerprint.model_identity(model)
    file = {name: identity[name] for name in ("bytes", "sample_sha256")}
    machine = hardware.fingerprint(), hardware.gpus()
    everything = repr((machine, version("llama-cpp-python"), file, tuple(conditions)))
    return Path(user_cache_dir("specplug")) / folder / f"{hashlib.sha256(everything.encode()).hexdigest()[:24]}.json"
