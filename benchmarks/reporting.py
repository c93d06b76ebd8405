"""What benchmarks of engine settings share: arguments, a heading that names the machine, and JSON files."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

from specplug.errors import SpecplugError, UsageError
from specplug.machine import fingerprint, hardware

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")


def run_benchmark(script: str, args: argparse.Namespace) -> None:
    """Print the heading, then call `args.run(args, document)`; exits with one line where that fails."""
    command = shlex.join(["python", f"benchmarks/{script}", *(_named(arg) for arg in sys.argv[1:])])
    document: dict[str, Any] = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": hardware.fingerprint(),
        "flags": cpu_flags(),
        "versions": fingerprint.versions("llama-cpp"),
    }
    warning = hardware.busy_warning()
    if warning:
        print(warning, file=sys.stderr)
    try:
        if args.json and not args.json.resolve().parent.is_dir():
            raise UsageError(f"{args.json}: no such folder; create it first")
        print(heading(document), end="\n\n", flush=True)
        args.run(args, document)
    except SpecplugError as error:
        sys.exit(f"error: {error}")


def positive_int(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _named(argument: str) -> str:
    """An argument of the command line; of a path only its last part, since its folder means nothing elsewhere."""
    option, equals, path = argument.rpartition("=")
    return f"{option}{equals}{Path(path).name}" if "/" in path else argument


def cpu_flags() -> dict[str, bool]:
    """Which of CPU_FLAGS the processor has; empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return {} if flags is None else {name: name in flags for name in CPU_FLAGS}


def heading(document: dict[str, Any]) -> str:
    machine, flags = document["machine"], document["flags"]
    words = [f"{machine['cpu']}, {machine['cores']} cores"]
    for word, wanted in (("has", True), ("lacks", False)):
        names = [name for name, found in flags.items() if found == wanted]
        words += [f"{word} {', '.join(names)}"] if names else []
    words.append(", ".join(f"{package} {number}" for package, number in document["versions"].items()))
    return "; ".join([*words, document["date"], f"`{document['command']}`"])


def write(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def threads_text(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"
