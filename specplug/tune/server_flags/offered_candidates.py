"""The candidates that the server of a request offers, found out from its help and from what is installed beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from specplug.errors import UsageError
from specplug.subjects.drafting_flags import flag_name, is_switch
from specplug.tune.server_flags.llama_candidates import llama_candidates, lookup_probe
from specplug.tune.server_flags.server_candidates import Candidate
from specplug.tune.server_flags.server_request import ServerRequest
from specplug.tune.server_flags.vllm_candidates import TABLE, VllmInstallation, vllm_candidates, vllm_probes

PROBE_LENGTHS = (3, 8, 2, 16, 5, 47, 1)
"""Draft tokens with which the cost of passes is learned, with lookup of one token, which drafts in most passes. Those
come first that say most about others, since there may be no time for all."""

ASK_S = 60.0
"""Seconds for a short Python program beside vLLM."""

PYTHON = re.compile(r"python[0-9.]*")
EXEC = re.compile(r"""'exec' (?:"([^"]+)"|'([^']+)'|(\S+))""")
LONGEST_LINE = 4096

ASK = """
import importlib.util, json, pathlib
found = importlib.util.find_spec("vllm")
text = ""
for place in (found.submodule_search_locations or []) if found else []:
    file = pathlib.Path(place, "config", "speculative.py")
    text += file.read_text() if file.is_file() else ""
there = {name: importlib.util.find_spec(name) is not None for name in ("arctic_inference", "specplug")}
print(json.dumps({"suffix": there["arctic_inference"], "specplug": there["specplug"], "text": text}))
"""
"""Reads vLLM's settings without importing it, which takes seconds."""


ASK_PLUGIN = """
import json, sys
from specplug import profile as profiles
from specplug.engines.vllm.runner_choice import settings_for
from specplug.profile import PlannerSettings, Profile, VllmSettings
from specplug.registry import ProposerSpec
found = []
for methods in (["suffix"], ["suffix", "token_recycling"]):
    for length in (3, 6):
        one = Profile(
            "tuned", engine="vllm", proposers=tuple(map(ProposerSpec, methods)),
            planner=PlannerSettings(mode="static", max_nodes=length), vllm=VllmSettings(num_speculative_tokens=length),
        )
        settings = settings_for(one, "", sys.argv[1])
        settings["additional_config"]["specplug"]["profile"] = profiles.as_mapping(one)
        flags = []
        for key in ("speculative_config", "additional_config"):
            flags += ["--" + key.replace("_", "-"), json.dumps(settings[key])]
        found.append([" + ".join(methods), length, flags])
print(json.dumps(found))
"""
"""Makes the flags of specplug's plugin with the specplug beside vLLM, which knows its runner."""


def checked_candidates(
    request: ServerRequest, check: Callable[[Sequence[str]], object] = lambda argv: None
) -> tuple[list[Candidate], list[str]]:
    """As `candidates_of`.

    check  receives the command with the flags of each candidate, and raises UsageError where it cannot be the result
    UsageError where there is none, for flags of the user's own that contradict one, and where the command drafts
    already, because plain decoding could not be measured then.
    """
    command = request.command
    names = [flag_name(command.kind, word.partition("=")[0]) for word in command.argv]
    if drafting := next((name for name in names if is_switch(command.kind, name)), None):
        raise UsageError(
            f"--server: the command has {drafting}, which drafts, so plain decoding cannot be measured; leave out the "
            "flags that draft, which are tried anyway (name a model that drafts with --draft)"
        )
    tried, missing = candidates_of(request)
    if not tried:
        _, always = candidates_of(replace(request, drafters=(), heads=()))  # of each lookup, which is said already
        raise UsageError(
            f"--server: there is nothing to try: this {command.program} has no lookup (a --spec-type such as "
            "ngram-simple), and no model that drafts was found; use a newer build, or pass --draft MODEL.gguf"
            + "".join(f"; {line}" for line in missing if line not in always)
        )
    for candidate in tried:
        check(command.with_flags(candidate.flags))  # which raises for what contradicts the user's own flags
    return tried, missing


def candidates_of(request: ServerRequest) -> tuple[list[Candidate], list[str]]:
    """All candidates but plain decoding, and one sentence for each kind that this server lacks.

    UsageError for a server whose flags are not known.
    """
    command = request.command
    if command.kind == "llama-server" and command.help is not None:
        return llama_candidates(command.help, drafters=request.drafters, heads=request.heads)
    if command.kind == "vllm":
        installed = vllm_installation(command.argv, command.model or "")
        return vllm_candidates(installed, drafters=request.drafters, heads=request.heads, levels=request.concurrency)
    raise UsageError(
        f"--server: {command.program} is neither llama-server nor vLLM, so its flags for drafting are not known; to "
        "tune specplug itself, leave out --server; bench and verify take any server"
    )


def probes_of(request: ServerRequest) -> list[Candidate]:
    """Lookups that draft often, of several lengths; empty where the server has none that is known."""
    command = request.command
    if command.kind == "vllm":
        return vllm_probes()
    if command.help is None:
        return []
    probes = [lookup_probe(command.help, length) for length in PROBE_LENGTHS]
    return [one for one in probes if one is not None]


def vllm_installation(argv: Sequence[str], model: str) -> VllmInstallation | None:
    """What the Python of a `vllm` command has; None where that Python is not found, or does not answer."""
    python = python_of(argv)
    found = _answer([python, "-c", ASK]) if python is not None else None
    if python is None or found is None:
        return None
    plugin = _answer([python, "-c", ASK_PLUGIN, model]) if found["specplug"] else None
    return VllmInstallation(
        settings=frozenset({TABLE} if TABLE in found["text"] else ()),
        suffix=found["suffix"],
        plugin=tuple((methods, length, tuple(flags)) for methods, length, flags in plugin or ()),
    )


def python_of(argv: Sequence[str]) -> str | None:
    """The Python that a command names, or with which its script `vllm` begins; None where neither is one.

    Scripts begin with `#!PYTHON`, with `#!/usr/bin/env python3`, or, where the path is long or has spaces, with
    `#!/bin/sh` and a line that replaces the shell with Python. Source: pip's vendored distlib, scripts.py.
    """
    for word in argv:
        name = Path(word).name
        if PYTHON.fullmatch(name):
            return shutil.which(word)
        if name == "vllm" and (path := shutil.which(word)) is not None:
            return _interpreter(Path(path))
    return None


def _interpreter(script: Path) -> str | None:
    try:
        with open(script, "rb") as file:
            first, second = (file.readline(LONGEST_LINE).decode(errors="replace").strip() for _ in range(2))
    except OSError:
        return None
    if not first.startswith("#!"):
        return None
    words = first.removeprefix("#!").split()
    program = Path(words[0]).name if words else ""
    if program == "env":
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    elif program == "sh":
        words = [word for quoted in EXEC.findall(second) for word in quoted if word]
    return shutil.which(words[0]) if words and PYTHON.fullmatch(Path(words[0]).name) else None


def _answer(words: Sequence[str]) -> Any:
    """The JSON in the last line that a program prints; None where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, timeout=ASK_S, stdin=subprocess.DEVNULL, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None
