"""What a valid profile lacks before it can be used here: an engine, a server's program, a model or a drafter."""

from __future__ import annotations

import shutil

from specplug import profile
from specplug.engines.vllm import versions
from specplug.errors import SpecplugError
from specplug.models import drafter_folders
from specplug.profile.server_programs import assigns
from specplug.profile.with_drafter import BUILT

from .preparation import needs_of


def lacking(name: str) -> str | None:
    """What the profile lacks, in a few words; None where nothing is missing. UsageError where it is invalid.

    Only names and folders are looked at: nothing is loaded, and no demo model is assembled.
    """
    chosen = profile.load(name)
    if chosen.server is not None:
        program = next((word for word in chosen.server.command if not assigns(word)), "")
        return None if shutil.which(program) else f"needs {program}"
    if chosen.engine == "vllm" and versions.installed() is None:
        return "needs vLLM"
    try:
        needs = needs_of([chosen])
        drafters = [
            spec.options["model"] for spec in chosen.proposers if spec.method in BUILT and "model" in spec.options
        ]
        unbuilt = [ref for ref in drafters if not drafter_folders.is_built(drafter_folders.place(ref))]
    except SpecplugError as error:  # a reference or the arguments of a build are invalid
        return str(error)
    return ", ".join([*(["not downloaded"] if needs.downloads else []), *(["not built"] if unbuilt else [])]) or None
