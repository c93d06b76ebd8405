"""Shows what specplug does with a llama.cpp that its author's defaults built with AMX.

    python benchmarks/faulty_library.py                  # builds it (minutes) and runs with it
    python benchmarks/faulty_library.py --library DIR    # runs with the libraries in DIR

Needs a processor with AMX to show a fault; on another one the library works, and the output says so. An empty cache
folder is used, so that the library is tried anew. Prints the exit code and stderr of `specplug run` and the last line
of `specplug doctor`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from specplug.engines.llama_cpp.probe import processor_flags

SPECPLUG = Path(sys.executable).with_name("specplug")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path)
    args = parser.parse_args()
    print("this processor has AMX" if "amx_tile" in processor_flags() else "this processor has no AMX")
    with TemporaryDirectory() as scratch:
        library = args.library or build(Path(scratch))
        environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(library), "XDG_CACHE_HOME": str(Path(scratch) / "cache")}
        for _ in range(2):
            began = perf_counter()
            done = subprocess.run(
                [SPECPLUG, "run", "--max-tokens", "8", "Name three rivers."],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            print(f"\nspecplug run: exit code {done.returncode}, {perf_counter() - began:.1f} s\n{done.stderr.strip()}")
        report = subprocess.run([SPECPLUG, "doctor"], env=environment, capture_output=True, text=True)
        print(f"\nspecplug doctor:\n{report.stdout.splitlines()[-1]}")


def build(folder: Path) -> Path:
    """The libraries of a wheel of the installed version, built with llama.cpp's own defaults."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir"]
    subprocess.run(
        [
            *pip,
            "--no-binary=llama-cpp-python",
            f"--wheel-dir={folder}",
            f"llama-cpp-python=={version('llama-cpp-python')}",
        ],
        env={name: value for name, value in os.environ.items() if name not in ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS")},
        check=True,
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "wheel")
    return folder / "wheel" / "llama_cpp" / "lib"


if __name__ == "__main__":
    main()
