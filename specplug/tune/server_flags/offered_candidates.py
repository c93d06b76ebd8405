"""The candidates that the server of a request offers, found out from its help and from what is installed beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specplug.errors import UsageError
from specplug.tune.server_flags.server_candidates import Candidate, RuleSizes, llama_candidates
from specplug.tune.server_flags.server_request import ServerRequest
from specplug.tune.server_flags.vllm_candidates import ADAPTIVE, TABLE, VllmInstallation, vllm_candidates, vllm_probes

PROBE_LENGTHS = (2, 6, 15, 47)
"""Draft tokens with which the cost of passes is learned, with lookup of one token, which drafts in most passes."""

ASK_S = 60.0
"""Seconds for a short Python program beside vLLM."""

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


def candidates_of(request: ServerRequest) -> tuple[list[Candidate], list[str]]:
    """All candidates but plain decoding, and one sentence for each kind that this server lacks.

    UsageError for a server whose flags are not known.
    """
    command = request.command
    if command.kind == "llama-server" and command.help is not None:
        return llama_candidates(command.help, drafters=request.drafters, heads=request.heads)
    if command.kind == "vllm":
        installed = vllm_installation(command.argv, command.model or "")
        return vllm_candidates(installed, drafters=request.drafters, levels=request.concurrency)
    raise UsageError(
        f"--server: {command.program} is neither llama-server nor vLLM, so its flags for drafting are not known; to "
        "tune specplug itself, leave out --server; bench and verify take any server"
    )


def probes_of(request: ServerRequest) -> list[Candidate]:
    """Lookups that draft often, of ascending length; empty where the server has none that is known."""
    command = request.command
    if command.kind == "vllm":
        return vllm_probes()
    if command.help is None or "ngram-simple" not in command.help.spec_types:
        return []
    return [
        Candidate(
            f"ngram-simple 1, {length} drafted",
            "ngram-simple",
            (
                *("--spec-type", "ngram-simple"),
                *("--spec-ngram-simple-size-n", "1"),
                *("--spec-ngram-simple-size-m", str(length)),
            ),
            (RuleSizes("ngram-simple", (1, length)),),
        )
        for length in PROBE_LENGTHS
    ]


def vllm_installation(argv: Sequence[str], model: str) -> VllmInstallation:
    """What the Python of a `vllm` command has; nothing where that Python is not found."""
    python = _python_of(argv)
    if python is None:
        return VllmInstallation()
    found = _answer([python, "-c", ASK])
    if found is None:
        return VllmInstallation()
    plugin = _answer([python, "-c", ASK_PLUGIN, model]) if found["specplug"] else None
    return VllmInstallation(
        settings=frozenset(name for name in (TABLE, ADAPTIVE) if name in found["text"]),
        suffix=found["suffix"],
        plugin=tuple((methods, length, tuple(flags)) for methods, length, flags in plugin or ()),
    )


def _answer(words: Sequence[str]) -> Any:
    """The JSON in the last line that a program prints; None where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, timeout=ASK_S, stdin=subprocess.DEVNULL, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def _python_of(argv: Sequence[str]) -> str | None:
    """The interpreter in the first line of the script `vllm`, or the one that the command itself names."""
    for word in argv:
        name = Path(word).name
        if name.startswith("python"):
            return shutil.which(word)
        if name == "vllm" and (path := shutil.which(word)) is not None:
            with open(path, "rb") as file:
                first = file.readline().decode(errors="replace").strip()
            return first.removeprefix("#!").split()[0] if first.startswith("#!") and len(first) > 2 else None
    return None
