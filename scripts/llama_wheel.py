#!/usr/bin/env python3
"""Build the wheel of llama-cpp-python once per version and machine, and print its path.

    python scripts/llama_wheel.py              # build the wheel unless it is stored already, and print its path
    python scripts/llama_wheel.py --dry-run    # print what would be built, as JSON
    python scripts/llama_wheel.py --check      # decode one token with the installed llama-cpp-python

llama-cpp-python is compiled for the processor that it is built on. On a processor with AMX, llama.cpp's AMX code ends
the process with `Illegal instruction`, so there it is compiled without AMX. pip must not build it by itself: it would
store a faulty wheel in its own cache and install that wheel again.

Wheels are stored in ${XDG_CACHE_HOME:-~/.cache}/specplug/wheels/VERSION-KEY/, outside the checkout, so that another
clone builds nothing. KEY is a hash of everything that determines the compiled code: the processor's flags, the build
flags, Python's ABI and the C library. The script takes the newest version that pyproject.toml allows or, without a
connection to the package index, the newest one that is stored.

The wheel is built for the Python that runs the script. It needs pip and the standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import operator
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"

AMX_OFF = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""Compiler flags for a processor with AMX. llama.cpp requests the kernel's permission for AMX registers in one thread
only, and the compiler drops its tile configuration. Remove this, and what uses it, once pyproject.toml requires a
llama-cpp-python that contains github.com/ggml-org/llama.cpp/pull/26954."""

BUILD_VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")
"""The environment variables besides CMAKE_ARGS that change the compiled code."""

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")

CHECK = """
from llama_cpp import Llama
from specplug.models.references import DEMO, resolve
Llama(str(resolve(DEMO)), n_ctx=64, verbose=False)("The", max_tokens=1)
"""
"""A quantised model is needed: the faulty code is in its matrix products, not in what an import runs."""


@dataclass(frozen=True, slots=True)
class Build:
    """One way to compile llama-cpp-python, and the folder in which its wheel is stored."""

    version: str
    key: str
    cmake_args: str
    folder: str


def main() -> int:
    arguments = _parse_arguments()
    if arguments.check:
        return check_installed()
    cpu = processor(arguments.cpuinfo)
    cmake_args = cmake_arguments(cpu)
    key = build_key(cpu, cmake_args)
    wheels = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specplug" / "wheels"
    version = arguments.version or newest_version(wheels, key)
    build = Build(version, key, cmake_args, str(wheels / f"{version}-{key}"))
    print(json.dumps(asdict(build), indent=2) if arguments.dry_run else stored_wheel(build) or build_wheel(build))
    return 0


def processor(cpuinfo: Path) -> str:
    """The machine and the processor's instruction sets; the processor's name where the system has no /proc/cpuinfo."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # macOS
        name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], check=True, capture_output=True, text=True)
        return f"{platform.machine()} {name.stdout.strip()}"
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)  # ARM's line is named Features
    return " ".join([platform.machine(), *sorted(flags[1].split() if flags else [])])


def cmake_arguments(cpu: str) -> str:
    """The environment's CMAKE_ARGS; on a processor with AMX, with AMX switched off in the C and C++ flags."""
    given = os.environ.get("CMAKE_ARGS", "")
    if "amx_tile" not in cpu.split():
        return given
    arguments = shlex.split(given)
    for name, variable in (("CMAKE_C_FLAGS", "CFLAGS"), ("CMAKE_CXX_FLAGS", "CXXFLAGS")):
        # Of several definitions CMake takes the last; it reads the environment variable where there is none.
        flags = os.environ.get(variable, "")
        for argument in list(arguments):
            if defined := re.fullmatch(rf"-D{name}(?::\w+)?=(.*)", argument):
                flags = defined[1]
                arguments.remove(argument)
        arguments.append(f"-D{name}={f'{flags} {AMX_OFF}'.strip()}")
    return shlex.join(arguments)


def build_key(cpu: str, cmake_args: str) -> str:
    """Sixteen hex digits that differ wherever the compiled code may differ."""
    python = f"{sys.implementation.cache_tag} {sysconfig.get_platform()} {' '.join(platform.libc_ver())}"
    variables = [f"{name}={os.environ.get(name, '')}" for name in BUILD_VARIABLES]
    return hashlib.sha256("\n".join([cpu, cmake_args, python, *variables]).encode()).hexdigest()[:16]


def newest_version(wheels: Path, key: str) -> str:
    """The newest version that pyproject.toml allows, from the package index or else from the stored wheels."""
    requirement = _requirement()
    listed = subprocess.run(
        [*PIP, "--timeout=15", "--retries=1", "index", "versions", "llama-cpp-python"],
        capture_output=True,
        text=True,
    )
    available = re.search(r"^Available versions: (.*)$", listed.stdout, re.MULTILINE)
    if available:
        allowed = [version for version in available[1].split(", ") if _allows(requirement, version)]
        where = "the package index"
    else:
        _log("the package index cannot be read; looking for a stored wheel of llama-cpp-python")
        stored = [path.parent.name.removesuffix(f"-{key}") for path in wheels.glob(f"*-{key}/*.whl")]
        allowed = [version for version in stored if _allows(requirement, version)]
        where = str(wheels)
    if not allowed:
        last = " ".join(listed.stderr.strip().splitlines()[-1:])
        sys.exit(
            f"llama_wheel: {requirement}: not found in {where} ({last}); check the connection to the package index"
        )
    return max(allowed, key=_numbers)


def stored_wheel(build: Build) -> Path | None:
    """The stored wheel, or None. A folder appears under its final name only with a complete wheel in it."""
    return next(Path(build.folder).glob("*.whl"), None)


def build_wheel(build: Build) -> Path:
    """Compile the wheel in a temporary folder beside its final one, and rename the folder when it is complete."""
    folder = Path(build.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    options = f" with CMAKE_ARGS={build.cmake_args}" if build.cmake_args else ""
    _log(f"compiling llama-cpp-python {build.version}{options}; this takes some minutes, once for this machine")
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
        target = Path(scratch) / "wheel"
        command = [*PIP, "wheel", "--no-deps", "--no-cache-dir", "--no-binary=llama-cpp-python"]
        done = subprocess.run(
            [*command, f"--wheel-dir={target}", f"llama-cpp-python=={build.version}"],
            env=os.environ | {"CMAKE_ARGS": build.cmake_args},
            stdout=sys.stderr,  # stdout is for the path
        )
        if done.returncode or not list(target.glob("*.whl")):
            sys.exit(
                f"llama_wheel: llama-cpp-python {build.version} could not be compiled (see above); it needs a "
                "C and a C++ compiler"
            )
        (target / "build.json").write_text(json.dumps(asdict(build), indent=2) + "\n", encoding="utf-8")
        try:
            target.rename(folder)
        except OSError:  # another process was faster
            if not stored_wheel(build):
                raise
    wheel = stored_wheel(build)
    assert wheel is not None
    return wheel


def check_installed() -> int:
    """Decode one token of the demo model in a process of its own, and say in one line what is wrong if it fails."""
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    if done.returncode == -signal.SIGILL:
        _log(
            "llama-cpp-python was compiled for instructions that this processor does not run (Illegal instruction); "
            "delete ${XDG_CACHE_HOME:-~/.cache}/specplug/wheels, set CMAKE_ARGS=-DGGML_NATIVE=OFF and run make again"
        )
    elif done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        _log(f"the installed llama-cpp-python cannot decode the demo model: {last[0]}")
    return min(abs(done.returncode), 1)


def _requirement() -> str:
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return str(next(line for line in extras["llama-cpp"] if line.startswith("llama-cpp-python")))


def _allows(requirement: str, version: str) -> bool:
    """Whether a requirement of the form `name>=1.2,<2` allows a released version."""
    operators = {
        ">=": operator.ge,
        "<=": operator.le,
        "==": operator.eq,
        "!=": operator.ne,
        ">": operator.gt,
        "<": operator.lt,
    }
    bounds = re.findall(r"(>=|<=|==|!=|>|<)\s*([\d.]+)", requirement)
    return all(operators[sign](_numbers(version), _numbers(bound)) for sign, bound in bounds)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _log(message: str) -> None:
    print(f"llama_wheel: {message}", file=sys.stderr)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the wheel of llama-cpp-python once, and print its path.")
    parser.add_argument("--dry-run", action="store_true", help="print what would be built, as JSON")
    parser.add_argument("--check", action="store_true", help="decode one token with the installed llama-cpp-python")
    parser.add_argument("--version", help="the version to build (default: the newest that pyproject.toml allows)")
    parser.add_argument("--cpuinfo", type=Path, default=Path("/proc/cpuinfo"), help="where to read the processor flags")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
