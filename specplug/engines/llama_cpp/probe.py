"""Reports what the installed llama.cpp library can do, as JSON, when it is run as a module in its own process.

A library that was built for another processor kills its process at the first missing instruction; `look` survives that.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

MARK = "specplug-probe:"
"""Prefix of the line that holds the JSON, since the library may print lines of its own."""


def look() -> dict[str, Any]:
    """Run the probe. Returns version, works, problem, system_info, features and gpu_offload.

    The last three are missing where the library does not work. llama_cpp is not imported into this process.
    """
    try:
        report: dict[str, Any] = {"version": version("llama-cpp-python"), "works": False}
    except PackageNotFoundError:
        return {"version": None, "works": False, "problem": "not installed"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__], capture_output=True, text=True, errors="replace", timeout=120
        )
    except (OSError, subprocess.SubprocessError) as error:
        return report | {"problem": f"its library cannot be tested ({error})"}
    answer = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not answer:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return report | {"problem": f"its library does not load ({last})"}
    return {**report, "works": True, "problem": None, **json.loads(answer[0].removeprefix(MARK))}


def features(system_info: str) -> dict[str, int]:
    """The features in a line such as `CPU : AVX = 1 | LLAMAFILE = 1 | `."""
    found = {}
    for part in system_info.replace(":", "|").split("|"):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if equals and value.isdecimal():
            found[name] = int(value)
    return found


def main() -> None:
    from llama_cpp import llama_cpp

    info = llama_cpp.llama_print_system_info().decode(errors="replace").strip()
    offload = bool(llama_cpp.llama_supports_gpu_offload())
    print(MARK + json.dumps({"system_info": info, "features": features(info), "gpu_offload": offload}))


if __name__ == "__main__":
    main()
