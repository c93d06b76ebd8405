"""scripts/llama_wheel.py: build flags, the key of a stored wheel, and that only a complete build is stored.

Nothing is compiled: a stand-in for pip, which the script runs as `python -m pip`, writes the wheels.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
PIP = """
import os, sys
from pathlib import Path

mode = os.environ["FAKE_PIP"]
if "index" in sys.argv:
    if mode == "offline":
        sys.exit("ERROR: No matching distribution found")
    print("llama-cpp-python (99.10.0)")
    print("Available versions: 99.9.0, 99.10.0, 0.3.1")
else:
    with open(os.environ["FAKE_PIP_LOG"], "a") as log:
        log.write(f"{sys.argv[-1]} {os.environ['CMAKE_ARGS']}\\n")
    folder = Path(next(a for a in sys.argv if a.startswith("--wheel-dir=")).split("=", 1)[1])
    folder.mkdir(parents=True)
    (folder / "llama_cpp_python-any.whl").write_text("half" if mode == "failing" else "complete")
    sys.exit(mode == "failing")
"""


class Script:
    """Runs the script with its own cache folder, /proc/cpuinfo and pip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = folder / "cache" / "specplug" / "wheels"
        self.log = folder / "builds.log"
        (folder / "pip").mkdir()
        (folder / "pip" / "__init__.py").touch()
        (folder / "pip" / "__main__.py").write_text(PIP)

    def run(self, *arguments: str, cpu: str = "fma avx2", mode: str = "online", **variables: str) -> str:
        """Its stdout; CalledProcessError where it fails."""
        cpuinfo = self.folder / "cpuinfo"
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {cpu}\n\nprocessor\t: 1\nflags\t\t: {cpu}\n")
        environment = {
            name: value for name, value in os.environ.items() if name not in ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS")
        }
        environment |= {"PYTHONPATH": str(self.folder), "XDG_CACHE_HOME": str(self.folder / "cache")}
        environment |= {"FAKE_PIP": mode, "FAKE_PIP_LOG": str(self.log), **variables}
        command = [sys.executable, str(ROOT / "scripts" / "llama_wheel.py"), "--cpuinfo", str(cpuinfo), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        done.check_returncode()
        return done.stdout

    def plan(self, **keywords: str) -> dict[str, str]:
        plan: dict[str, str] = json.loads(self.run("--dry-run", **keywords))
        return plan

    def builds(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_the_users_flags_are_unchanged_without_amx(script: Script) -> None:
    assert script.plan()["cmake_args"] == ""
    assert script.plan(CMAKE_ARGS="-DGGML_BLAS=ON")["cmake_args"] == "-DGGML_BLAS=ON"


def test_amx_is_switched_off_for_c_and_cpp_where_the_processor_has_it(script: Script) -> None:
    arguments = shlex.split(script.plan(cpu="avx2 amx_bf16 amx_tile amx_int8")["cmake_args"])
    assert arguments == [f"-DCMAKE_C_FLAGS={NO_AMX}", f"-DCMAKE_CXX_FLAGS={NO_AMX}"]


def test_the_users_flags_are_kept_where_amx_is_switched_off(script: Script) -> None:
    given = "-DGGML_BLAS=ON -DCMAKE_C_FLAGS:STRING='-O2 -g' -DGGML_CUDA=OFF"
    plan = script.plan(cpu="amx_tile", CMAKE_ARGS=given, CXXFLAGS="-O1")
    assert shlex.split(plan["cmake_args"]) == [
        "-DGGML_BLAS=ON",
        "-DGGML_CUDA=OFF",
        f"-DCMAKE_C_FLAGS=-O2 -g {NO_AMX}",
        f"-DCMAKE_CXX_FLAGS=-O1 {NO_AMX}",
    ]


def test_the_key_depends_on_everything_that_changes_the_compiled_code(script: Script) -> None:
    first = script.plan()["key"]
    assert script.plan(cpu="avx2 fma")["key"] == first  # the order of the flags does not matter
    others = [
        script.plan(cpu="fma avx2 avx512f")["key"],
        script.plan(CMAKE_ARGS="-DGGML_BLAS=ON")["key"],
        script.plan(CFLAGS="-O1")["key"],
        script.plan(CC="clang")["key"],
    ]
    assert len({first, *others}) == 5


def test_the_newest_allowed_version_is_chosen_by_number(script: Script) -> None:
    plan = script.plan()
    assert plan["version"] == "99.10.0"
    assert plan["folder"] == str(script.wheels / f"99.10.0-{plan['key']}")


def test_a_wheel_is_built_once(script: Script) -> None:
    first = script.run()
    assert Path(first.strip()).read_text() == "complete"
    assert script.run() == first
    assert script.builds() == ["llama-cpp-python==99.10.0 "]
    script.run(cpu="amx_tile")
    assert len(script.builds()) == 2
    assert NO_AMX in script.builds()[1]


def test_a_stored_wheel_is_used_without_a_package_index(script: Script) -> None:
    built = script.run()
    assert script.run(mode="offline") == built
    assert len(script.builds()) == 1


def test_without_an_index_and_a_stored_wheel_one_line_reports_it(script: Script) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        script.run(mode="offline")
    assert "not found in" in failed.value.stderr.splitlines()[-1]
    script.run()
    with pytest.raises(subprocess.CalledProcessError):
        script.run(mode="offline", cpu="another")  # the stored wheel is for another processor


def test_a_failed_build_leaves_nothing(script: Script) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        script.run(mode="failing")
    assert "could not be compiled" in failed.value.stderr.splitlines()[-1]
    assert list(script.wheels.iterdir()) == []
    assert Path(script.run().strip()).read_text() == "complete"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "Illegal instruction"),
        ("raise OSError('libllama.so: no such file')", "OSError: libllama.so: no such file"),
    ],
)
def test_the_check_reports_in_one_line_why_the_installed_library_fails(script: Script, body: str, reason: str) -> None:
    (script.folder / "llama_cpp.py").write_text(body)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        script.run("--check")
    assert failed.value.returncode == 1
    (line,) = failed.value.stderr.splitlines()
    assert reason in line


@pytest.mark.llama
def test_the_check_passes_with_the_library_that_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "llama_wheel.py"), "--check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
