"""What a valid profile lacks before it can be used here: an engine, a drafter or the packages of a demo model."""

from __future__ import annotations

from importlib.util import find_spec

from specplug import profile
from specplug.engines.vllm import versions
from specplug.errors import SpecplugError
from specplug.models import drafter_folders
from specplug.models.packaged_models import SPLIT_MODELS


def lacking(name: str) -> str | None:
    """What the profile lacks, in a few words; None where nothing is missing. UsageError where it is invalid.

    Only names and folders are looked at: nothing is loaded, and no demo model is assembled.
    """
    chosen = profile.load(name)
    if chosen.engine == "vllm" and versions.installed() is None:
        return "needs vLLM"
    for ref in [chosen.model, *(spec.options.get("model") for spec in chosen.proposers)]:
        if isinstance(ref, str) and ref.startswith(drafter_folders.PREFIX):
            try:
                drafter_folders.resolve(ref)
            except SpecplugError:
                return "not built"
        if isinstance(ref, str) and ref in SPLIT_MODELS and find_spec(f"{SPLIT_MODELS[ref].package}1") is None:
            return f"needs {SPLIT_MODELS[ref].install}"
    return None
