"""The measured costs of engine settings, remembered for each model, machine and version of llama-cpp-python.

Reads and writes files only; llama.cpp is not loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from specplug.machine.files import write_atomically
from specplug.machine.remembered import measurement_path
from specplug.planning.request_time import SettingCosts
from specplug.profile import Runtime

SCHEMA = 2
"""Version of the format."""


def label(runtime: Runtime) -> str:
    """A setting in words, such as `flash attention off, f16 cache`; only what differs from llama.cpp's own is named."""
    words = [f"flash attention {'on' if runtime.flash_attention else 'off'}, {runtime.kv_type} cache"]
    if runtime.threads_batch not in (None, runtime.threads):
        words.append(f"{runtime.threads} and {runtime.threads_batch} threads")
    if runtime.ubatch is not None:
        words.append(f"ubatch {runtime.ubatch}")
    if runtime.gpu_layers:
        words.append(f"{'all' if runtime.gpu_layers < 0 else runtime.gpu_layers} layers on the GPU")
    words += [] if runtime.repack else ["weights not repacked"]
    words += [] if runtime.mmap else ["weights not mapped"]
    return ", ".join(words)


def comparable(runtime: Runtime) -> Runtime:
    """The runtime without what does not change the time of a pass: limits on length, and how tokens are drawn."""
    return replace(runtime, context=4096, batch=512, coupled=False)


def remembered(model: Path) -> dict[Runtime, SettingCosts]:
    """The settings that were measured for this model file here, by comparable runtime; empty where none were."""
    try:
        data = json.loads(_path(model).read_text(encoding="utf-8"))
        return {Runtime(**entry["runtime"]): SettingCosts.from_mapping(entry["costs"]) for entry in data["settings"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def remember(model: Path, measured: Mapping[Runtime, SettingCosts]) -> None:
    """Add settings to those that are remembered. Raises SpecplugError when the file cannot be written."""
    known = remembered(model) | {comparable(runtime): costs for runtime, costs in measured.items()}
    entries = [{"runtime": asdict(runtime), "costs": costs.as_mapping()} for runtime, costs in known.items()]
    write_atomically(_path(model), json.dumps({"schema": SCHEMA, "settings": entries}).encode())


def slowdown(model: Path, runtime: Runtime) -> tuple[float, Runtime, int] | None:
    """How many times as long a plain pass takes under `runtime` as under the fastest remembered setting.

    Returns that ratio at the context where it is largest, the fastest setting there, and the context in tokens. None
    where this setting was not measured. Keys that `runtime` leaves open count as measured with the same value.
    """
    table = remembered(model)
    measured = next((one for one in table if _matches(runtime, one)), None)
    if measured is None:
        return None
    own = table[measured]
    # Other threads or another device are another comparison, which the setting in words would not show.
    table = {one: costs for one, costs in table.items() if _same_processors(one, measured)}
    worst: tuple[float, Runtime, int] | None = None
    for place, context in enumerate(own.contexts):
        others = {
            one: costs.ms[costs.contexts.index(context)][0] for one, costs in table.items() if context in costs.contexts
        }
        best = min(others, key=others.__getitem__)
        ratio = own.ms[place][0] / others[best]
        if worst is None or ratio > worst[0]:
            worst = ratio, best, context
    return worst


def _matches(runtime: Runtime, measured: Runtime) -> bool:
    """Whether the settings that `runtime` names are those that were measured."""
    named = {key: value for key, value in asdict(comparable(runtime)).items() if value is not None}
    return all(getattr(measured, key) == value for key, value in named.items())


def _same_processors(one: Runtime, other: Runtime) -> bool:
    first, second = ((each.threads, each.threads_batch or each.threads, each.gpu_layers) for each in (one, other))
    return first == second


def _path(model: Path) -> Path:
    return measurement_path("settings-tables", model, (SCHEMA,))
