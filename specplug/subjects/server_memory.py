"""Whether a server still fits into memory beside those that run; from its command line and its models' headers.

What a command does not say, such as the size of a model that it will download, counts as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from specplug.engines.llama_cpp.memory_need import DEFAULT_KV_TYPE, KV_BYTES, MemoryNeed, memory_need
from specplug.errors import UsageError
from specplug.machine.memory import available_memory, gib
from specplug.models.gguf_header import read_header
from specplug.profile import Runtime
from specplug.subjects.server_command import CONTEXT, ServerCommand
from specplug.subjects.subject import SubjectError

MOST_LIVE = 2
"""Servers that may run at once: one that drafts beside one that does not."""

DRAFT_MODEL = ("-md", "--model-draft", "--spec-draft-model")
KEY_TYPE, VALUE_TYPE = ("-ctk", "--cache-type-k"), ("-ctv", "--cache-type-v")
GPU_LAYERS, DEVICES = ("-ngl", "--gpu-layers", "--n-gpu-layers"), ("-dev", "--device")
FIT = ("-fit", "--fit")
OFF = ("off", "disabled", "false", "0")
"""Values of a flag that turn it off. Source: `is_falsey` in llama.cpp's common/arg.cpp."""

LEAST_TYPE = "q4_0"
"""What a number of the cache is counted as where a fork has a type of its own."""

DEFAULT_CONTEXT = 4096
"""Tokens, where neither the command nor the model's header says how many."""


def server_bytes(command: ServerCommand, flags: Sequence[str] = ()) -> int:
    """What a llama-server with these flags takes, at least: weights, KV cache and the largest tensors of a pass, of the
    model and of its drafter. 0 where its model is no GGUF file on this disk, and where a GPU may hold any of that."""
    started = replace(command, argv=(*command.argv, *flags))
    model, drafter = started.model, started.value(DRAFT_MODEL)
    if command.kind != "llama-server" or model is None or not Path(model).is_file() or may_offload(started):
        return 0
    types = [started.value(names) or DEFAULT_KV_TYPE for names in (KEY_TYPE, VALUE_TYPE)]
    runtime = Runtime(
        kv_type=min([kind if kind in KV_BYTES else LEAST_TYPE for kind in types], key=KV_BYTES.__getitem__)
    )
    cells = _asked_context(started) or _trained_context(Path(model))
    needs = [memory_need(Path(model), runtime, cells)]
    if drafter is not None and Path(drafter).is_file():
        needs.append(memory_need(Path(drafter), Runtime(), cells))
    return sum(_least(need) for need in needs)


def may_offload(command: ServerCommand) -> bool:
    """Whether a GPU may take weights or cells of a llama-server.

    For a build that does not list its devices, whether -ngl asks for it.
    """
    layers = command.value(GPU_LAYERS)
    if layers == "0" or command.value(DEVICES) == "none":
        return False
    return command.has_gpu if command.has_gpu is not None else layers is not None


def fitted_flags(command: ServerCommand) -> list[str]:
    """The flags, of -ngl and -c, whose values a llama-server chooses by the memory of the GPU that is free when it
    starts. Beside another server it gets fewer layers or less context, and says so only in its log.

    These are the ones that the command does not set; none where the build has no --fit, or the command turns it off.
    `-ngl all` counts as set, and so does `-c 0`. Source: `common_fit_params` in llama.cpp's common/fit.cpp, and the
    flags in common/arg.cpp.
    """
    offered = command.help is not None and command.help.accepts(FIT[-1])
    if not offered or command.value(FIT) in OFF or not may_offload(command):
        return []
    layers = ["-ngl"] if command.value(GPU_LAYERS) in (None, "auto", "-1") else []
    return [*layers, *(["-c"] if command.value(CONTEXT) is None else [])]


def fit_advice(fitted: Sequence[str]) -> str:
    """How two servers run side by side as each runs alone. fitted: as `fitted_flags` returns it"""
    return f"use -fit off, or give {' and '.join(f'{flag} N' for flag in fitted)}"


def check_room(name: str, needed: int, running: Iterable[tuple[int, int]]) -> None:
    """Raise UsageError where a server that takes `needed` bytes does not fit, SubjectError where MOST_LIVE run already.

    running  of each server that runs: its process, and the bytes that it takes
    """
    others = list(running)
    if len(others) >= MOST_LIVE:
        raise SubjectError(f"{name} was not started: {len(others)} servers run already, and {MOST_LIVE} may; stop one")
    # Mapped weights of those that run count as free, since the kernel could give them up; they would be read again.
    free = available_memory().free + sum(_held(pid) for pid, _ in others)
    total = needed + sum(size for _, size in others)
    if needed and total > free:
        beside = f", with the {len(others)} beside it {gib(total)} GiB" if others else ""
        raise UsageError(
            f"{name} needs about {gib(needed)} GiB{beside}, and {gib(free)} GiB are free; "
            "use a smaller -c, or a smaller model"
        )


def _least(need: MemoryNeed) -> int:
    return need.total - (need.weights if need.sparse else 0)


def _asked_context(command: ServerCommand) -> int:
    """Tokens that the command asks for, else the build's default, which is 4096 in some; 0 for the model's own."""
    if command.context is not None:
        return command.context
    default = command.help.default("--ctx-size") if command.help is not None else None
    number = (default or "").split(",")[0]  # of `0, 0 = loaded from model`
    return int(number) if number.isdecimal() else 0


def _trained_context(model: Path) -> int:
    found = read_header(model).numbers.get("context_length")
    return found if isinstance(found, int) and found > 0 else DEFAULT_CONTEXT


def _held(pid: int) -> int:
    """Bytes that a process and its children hold and nobody can take from them: without mapped files."""
    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            used = one.memory_info()
            total += max(0, used.rss - getattr(used, "shared", 0))
    except psutil.Error:  # it has ended meanwhile
        pass
    return total
