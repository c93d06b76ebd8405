"""Reports what the installed llama.cpp library can do, as JSON, when it is run as a module in its own process.

A library that was built for another processor kills its process at the first missing instruction; `look` survives that.
What only shows when tokens are decoded is found by `library_check.py`.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MARK = "specplug-probe:"
"""Prefix of a line that holds JSON, since the library may print lines of its own."""

CPUINFO = Path("/proc/cpuinfo")

AMX_OFF = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""Compiler flags without which llama.cpp ends with `Illegal instruction` on a processor with AMX; the reason is in
scripts/llama_wheel.py, which has the same flags."""

VECTORS = {
    "AVX512": ("AVX-512", "avx512f"),
    "AVX2": ("AVX2", "avx2"),
    "AVX": ("AVX", "avx"),
    "SVE": ("SVE", "sve"),
    "NEON": ("NEON", "asimd"),
}
"""Vector instructions, the best first: llama.cpp's name, the usual name, and the flag in /proc/cpuinfo."""

PRODUCTS = {
    "8-bit": ("AVX512_VNNI", "AVX_VNNI", "DOTPROD", "MATMUL_INT8"),
    "bf16": ("AVX512_BF16", "BF16"),
    "AMX": ("AMX_INT8",),
}
"""Kinds of matrix products, and the features with which llama.cpp computes them faster."""


def look() -> dict[str, Any]:
    """Run the probe. llama_cpp is not imported into this process.

    version      of llama-cpp-python; None where it is not installed
    works        whether the library loads
    problem      why it does not; None where it does
    rebuild      the command that builds the library for this processor, where that is the remedy
    library      the library's file
    system_info, features, gpu_offload
                 llama.cpp's own line on the processor's features, the same as a mapping, and whether it can use a GPU

    The last four are missing where the library does not load.
    """
    try:
        report: dict[str, Any] = {"version": version("llama-cpp-python"), "works": False}
    except PackageNotFoundError:
        return {"version": None, "works": False, "problem": "not installed"}
    command = [sys.executable, "-P", "-m", __name__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        return report | {"problem": f"its library cannot be tested ({error})"}
    answer = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not answer:
        problem = f"its library does not load ({_ending(done)})"
        return report | {"problem": problem, "rebuild": rebuild_command(processor_flags())}
    report |= json.loads(answer[0].removeprefix(MARK))
    return report | {"works": True, "problem": None}


def features(system_info: str) -> dict[str, int]:
    """The features in a line such as `CPU : AVX = 1 | LLAMAFILE = 1 | `."""
    found = {}
    for part in system_info.replace(":", "|").split("|"):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if equals and value.isdecimal():
            found[name] = int(value)
    return found


def in_words(found: Mapping[str, int]) -> str:
    """What a build uses of the processor, such as `AVX-512, fast 8-bit and bf16 products`."""
    vectors = next((usual for name, (usual, _) in VECTORS.items() if found.get(name)), "no vector instructions")
    products = [kind for kind, names in PRODUCTS.items() if any(found.get(name) for name in names)]
    if not products:
        return vectors
    *most, last = products
    return f"{vectors}, fast {', '.join(most)}{' and ' if most else ''}{last} products"


def unused_vectors(found: Mapping[str, int], flags: Collection[str]) -> str | None:
    """The usual name of the best vector instructions that the processor has, where the build does not use them."""
    for name, (usual, flag) in VECTORS.items():
        if found.get(name):
            return None
        if flag in flags:
            return usual
    return None


def processor_flags() -> frozenset[str]:
    """The names of the processor's features by Linux; empty on other systems."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(found.partition(":")[2].split())


def rebuild_command(flags: Collection[str], *cmake: str) -> str:
    """How pip builds llama-cpp-python again for this processor. The cache is left out: it has the wheel that fails.

    cmake  further options for CMake, such as -DGGML_LLAMAFILE=OFF
    """
    pip = "pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
    return build_variables(flags, *cmake) + pip


def build_variables(flags: Collection[str], *cmake: str) -> str:
    """What precedes a command that compiles llama-cpp-python for a processor with these flags; often nothing."""
    if "amx_tile" in flags:
        cmake = (*cmake, *(f"-D{name}={AMX_OFF}" for name in ("CMAKE_C_FLAGS", "CMAKE_CXX_FLAGS")))
    return f'CMAKE_ARGS="{shlex.join(cmake)}" ' if cmake else ""


def _ending(done: subprocess.CompletedProcess[str]) -> str:
    """The last line on stderr of a failed process; how it ended where it printed nothing."""
    if done.returncode < 0:
        return signal.strsignal(-done.returncode) or f"signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def main() -> None:
    from llama_cpp import llama_cpp

    info = llama_cpp.llama_print_system_info().decode(errors="replace").strip()
    report = {
        "system_info": info,
        "features": features(info),
        "gpu_offload": bool(llama_cpp.llama_supports_gpu_offload()),
        "library": str(getattr(getattr(llama_cpp, "_lib", None), "_name", None) or Path(llama_cpp.__file__).parent),
    }
    print(MARK + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
