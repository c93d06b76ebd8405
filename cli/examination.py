"""What `specplug doctor` finds on this machine, as plain data: engines, limits, models, profiles and folders.

llama.cpp is tried in a process of its own, so that this one imports no engine.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from math import inf
from typing import Any

from specplug import __version__, profile, registry
from specplug.engines.llama_cpp import probe, settings_table
from specplug.engines.llama_cpp.library_check import WAYS, Findings, common_findings
from specplug.engines.vllm import versions as vllm_versions
from specplug.engines.vllm.runner_choice import expected_runner
from specplug.errors import EngineError, SpecplugError
from specplug.machine import hardware
from specplug.machine.cores import core_limit
from specplug.models import references

from .kept_folders import kept_folders, removal
from .profile_requirements import lacking

SLOW = 1.2
"""Engine settings are reported where a plain pass takes this many times as long as under the fastest measured ones."""


def examine() -> dict[str, Any]:
    """The findings, as `specplug doctor --json` prints them, without `advice` and `verdict`."""
    limit = core_limit()
    demo = _demo()
    llama = probe.look()
    llama |= decoding(common_findings) if llama["works"] else {"decoded": False}
    listed = profile.list_profiles()
    usable = [entry.name for entry in listed if entry.problem is None]
    lacks = {name: what for name in usable if (what := lacking(name)) is not None}
    folders = kept_folders()
    machine = {"busy_cores": hardware.busy_cores(), "threads": limit.cores, "limit": limit.reason}
    return {
        "schema": 1,
        "specplug": __version__,
        "python": platform.python_version(),
        "machine": hardware.fingerprint() | machine | {"gpus": hardware.gpus()},
        "engines": {"llama-cpp": llama | _words(llama), "vllm": _vllm()},
        "models": {references.DEMO: demo},
        "proposers": registry.names(),
        "profiles": {
            "folder": str(profile.user_folder()),
            "usable": usable,
            "lacking": lacks,
            "unusable": {entry.name: entry.problem for entry in listed if entry.problem},
        },
        "slow_settings": slow_settings(),
        "folders": {role: asdict(folder) for role, folder in folders.items()},
        "remove": removal(folders.values()),
    }


def decoding(find: Callable[[], Findings]) -> dict[str, Any]:
    """What trying to decode tokens adds to the report on llama.cpp.

    decoded   whether tokens were decoded
    left_out  what the library cannot do without ending the process, in words; None where it can do everything
    untried   why tokens were not decoded, where that could not be tried
    """
    try:
        found = find()
    except EngineError as error:
        rebuild = probe.rebuild_command(probe.processor_flags())
        return {"works": False, "decoded": False, "left_out": None, "problem": str(error), "rebuild": rebuild}
    if not found.tried:
        return {"decoded": False, "left_out": None, "untried": found.reason}
    if found.signal is None:
        return {"decoded": True, "left_out": None}
    rebuild = probe.rebuild_command(probe.processor_flags())
    return {"decoded": True, "left_out": WAYS[found.way].words, "rebuild": rebuild}


def _words(llama: dict[str, Any]) -> dict[str, Any]:
    """What the build uses of the processor, in words, and the better instructions that it leaves unused."""
    if "features" not in llama:
        return {}
    unused = probe.unused_vectors(llama["features"], probe.processor_flags())
    return {"uses": probe.in_words(llama["features"]), "unused": unused}


def _vllm() -> dict[str, Any]:
    package = vllm_versions.installed()
    if package is None:
        return {"version": None, "works": False, "problem": "not installed"}
    try:
        vllm_versions.require()
    except EngineError as error:
        return {"package": package[0], "version": package[1], "works": False, "problem": str(error)}
    runner = expected_runner()
    return {
        "package": package[0],
        "version": package[1],
        "works": None,
        "problem": f"supported, not tried; runner {runner}",
        "runner": runner,
    }


def _demo() -> dict[str, Any]:
    try:
        return {"path": str(references.resolve(references.DEMO)), "problem": None}
    except SpecplugError as error:
        return {"path": None, "problem": str(error)}


def slow_settings() -> list[dict[str, Any]]:
    """The user's own profiles whose engine settings were measured here to be slow for their model.

    profile  its name
    model    the model's file
    times    how many times as long a plain pass takes as under the fastest measured settings
    fastest  those settings, in words
    context  tokens in the cache at which the two were compared
    """
    found = []
    for entry in profile.list_profiles():
        if entry.source == "shipped" or entry.problem is not None:
            continue
        try:
            slow = _slow(profile.load(entry.name))
        except (SpecplugError, PackageNotFoundError, ArithmeticError, LookupError):  # no model, engine or whole table
            continue
        if slow is not None:
            found.append({"profile": entry.name} | slow)
    return found


def _slow(chosen: profile.Profile) -> dict[str, Any] | None:
    """What `slow_settings` reports of one profile; None where its settings are open, fast or not measured."""
    runtime = chosen.runtime
    if chosen.engine != "llama-cpp" or chosen.model is None:
        return None
    if runtime.flash_attention is None and runtime.kv_type is None:
        return None
    model = references.resolve(chosen.model)
    compared = settings_table.slowdown(model, runtime) if model.is_file() else None
    if compared is None or not SLOW <= compared[0] < inf:
        return None
    times, fastest, context = compared
    return {
        "model": str(model),
        "times": round(times, 2),
        "fastest": settings_table.label(fastest),
        "context": context,
    }
