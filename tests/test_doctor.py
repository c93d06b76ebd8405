"""What `specplug doctor` concludes: the verdict, the remedy for a faulty library, and the folders with their sizes.

A stand-in for llama_cpp plays the libraries that this machine does not have.
"""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specplug import profile
from specplug.engines.llama_cpp import probe
from specplug.engines.llama_cpp.library_check import Findings
from specplug.errors import EngineError
from specplug.machine.cores import core_limit
from specplug.models import drafter_folders
from specplug.profile import Profile
from specplug.registry import ProposerSpec
from specplug_cli import diagnosis, examination, kept_folders
from specplug_cli.profile_requirements import lacking

SPECPLUG = str(Path(sys.executable).with_name("specplug"))
ROOT = Path(__file__).parents[1]
LIBRARY = """
import os, signal

class llama_cpp:
    __file__ = __file__
    llama_print_system_info = staticmethod(lambda: b"CPU : AVX2 = 1 | AVX512 = {avx512} | AMX_INT8 = {amx} | ")
    llama_supports_gpu_offload = staticmethod(lambda: {gpu})

"""


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        monkeypatch.delenv(name)
    for name in ("CACHE", "CONFIG", "DATA", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    flags: str = "avx2",
    avx512: int = 0,
    amx: int = 0,
    gpu: bool = False,
) -> None:
    """Install the stand-in as llama-cpp-python 9.9, on a processor with these flags."""
    package, info = folder / "llama_cpp", folder / "llama_cpp_python-9.9.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text(LIBRARY.format(avx512=avx512, amx=amx, gpu=gpu))
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(probe, "CPUINFO", folder / "cpuinfo")
    probe.CPUINFO.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")


# -- the library -----------------------------------------------------------------------------------------------------


def test_a_library_that_loads_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, gpu=True)
    found = probe.look()
    assert (found["version"], found["works"], found["problem"]) == ("9.9", True, None)
    assert found["library"] == str(tmp_path / "llama_cpp") and found["gpu_offload"] is True


def test_a_library_that_dies_when_it_loads_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    (tmp_path / "llama_cpp" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    found = probe.look()
    assert (found["works"], found["problem"]) == (False, "its library does not load (Illegal instruction)")
    assert "--no-cache-dir" in found["rebuild"] and "CMAKE_ARGS" not in found["rebuild"]


def test_what_decoding_shows() -> None:
    def never() -> Findings:
        raise EngineError("it ends the process")

    assert examination.decoding(Findings) == {"decoded": True, "left_out": None}
    faulty = examination.decoding(lambda: Findings(way=1, signal="SIGILL"))
    assert faulty["decoded"] and "repack: false" in faulty["left_out"] and "--no-cache-dir" in faulty["rebuild"]
    dead = examination.decoding(never)
    assert (dead["works"], dead["decoded"], dead["problem"]) == (False, False, "it ends the process")


def test_the_rebuild_leaves_amx_out_on_a_processor_that_has_it() -> None:
    words = shlex.split(probe.rebuild_command({"avx512f", "amx_tile"}))
    assert words[0].startswith("CMAKE_ARGS=")
    off = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    assert shlex.split(words[0].removeprefix("CMAKE_ARGS=")) == [f"-DCMAKE_C_FLAGS={off}", f"-DCMAKE_CXX_FLAGS={off}"]


def test_the_flags_of_the_rebuild_are_those_of_the_script_for_wheels() -> None:
    spec = importlib.util.spec_from_file_location("llama_wheel", ROOT / "scripts" / "llama_wheel.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["llama_wheel"] = script
    try:
        spec.loader.exec_module(script)
        assert probe.AMX_OFF == script.AMX_OFF
        built = script.cmake_arguments("x86_64 amx_tile")
        assert f'CMAKE_ARGS="{built}"' in probe.rebuild_command({"amx_tile"})
    finally:
        del sys.modules["llama_wheel"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, "no vector instructions"),
        ({"NEON": 1, "DOTPROD": 1}, "NEON, fast 8-bit products"),
        ({"AVX": 1, "AVX2": 1, "AVX512": 0}, "AVX2"),
        ({"AVX2": 1, "AVX512": 1, "AVX512_VNNI": 1, "AVX512_BF16": 1}, "AVX-512, fast 8-bit and bf16 products"),
        (
            {"AVX512": 1, "AVX512_VNNI": 1, "AVX512_BF16": 1, "AMX_INT8": 1},
            "AVX-512, fast 8-bit, bf16 and AMX products",
        ),
    ],
)
def test_features_are_put_into_words(found: dict[str, int], words: str) -> None:
    assert probe.in_words(found) == words


def test_better_instructions_that_a_build_leaves_unused_are_named() -> None:
    assert probe.unused_vectors({"AVX2": 1}, {"avx", "avx2", "avx512f"}) == "AVX-512"
    assert probe.unused_vectors({"AVX2": 1, "AVX512": 0}, {"avx", "avx2"}) is None
    assert probe.unused_vectors({}, {"avx", "avx2"}) == "AVX2"
    assert probe.unused_vectors({"AVX512": 1}, {"avx512f"}) is None
    assert probe.unused_vectors({"NEON": 1}, set()) is None, "no flags are known on macOS"


# -- the verdict -----------------------------------------------------------------------------------------------------


def judged(report: dict[str, Any]) -> tuple[bool, str, str]:
    verdict = diagnosis.judge(report)
    return verdict["ready"], verdict["text"], verdict["next"]


def findings(
    llama: dict[str, Any] | None = None, vllm: dict[str, Any] | None = None, demo: str | None = "d.gguf"
) -> dict[str, Any]:
    missing = {"version": None, "works": False, "problem": "not installed"}
    return {
        "machine": {"threads": 4, "busy_cores": 0.0, "limit": "a CPU quota of 4.0 cores (cgroup)", "gpus": []},
        "engines": {"llama-cpp": llama or missing, "vllm": vllm or missing},
        "models": {"demo:smollm2": {"path": demo, "problem": None if demo else "missing"}},
        "profiles": {"unusable": {}},
        "slow_settings": [],
    }


WORKING = {
    "version": "9.9",
    "works": True,
    "problem": None,
    "decoded": True,
    "gpu_offload": False,
    "features": {"AVX2": 1},
    "unused": None,
}


def test_the_verdict_says_for_what_it_is_ready_and_what_to_type() -> None:
    assert judged(findings(WORKING)) == (
        True,
        "llama.cpp on the CPU with 4 threads (a CPU quota of 4.0 cores (cgroup)); no GPU support in this build",
        'specplug run "Why is the sky blue?"',
    )
    faulty = {"left_out": "without repacked weights", "rebuild": "pip install ..."}
    ready, text, following = judged(findings(WORKING | faulty | {"gpu_offload": True}, demo=None))
    assert ready and "--gpu-layers all" in text and "cgroup)), without repacked weights;" in text
    assert following == 'specplug run --model FILE.gguf "Why is the sky blue?"'


def test_the_verdict_without_an_engine_installs_one_without_a_compiler() -> None:
    ready, text, following = judged(findings())
    assert (ready, text) == (False, "no engine is installed")
    words = shlex.split(following)
    assert words[:3] == ["pip", "install", "specplug[llama-cpp,demo]"]
    assert words[words.index("--only-binary") + 1] == "llama-cpp-python"
    assert words[words.index("--extra-index-url") + 1].startswith("https://abetlen.github.io/llama-cpp-python/whl/")


def test_a_source_build_is_advised_with_what_the_processor_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "CPUINFO", tmp_path / "cpuinfo")
    plain, slow = findings(), findings(WORKING | {"features": {"AVX512": 1, "LLAMAFILE": 1}})
    probe.CPUINFO.write_text("flags : avx512f\n")
    assert any(
        line.endswith(": pip install --no-cache-dir 'specplug[llama-cpp,demo]'") for line in diagnosis.advise(plain)
    )
    assert any('CMAKE_ARGS="-DGGML_LLAMAFILE=OFF" pip' in line for line in diagnosis.advise(slow))
    probe.CPUINFO.write_text("flags : avx512f amx_tile\n")
    compiling = [line for report in (plain, slow) for line in diagnosis.advise(report) if "no-cache-dir" in line]
    assert len(compiling) == 2 and all(line.count("-mno-amx-tile") == 2 for line in compiling)


def test_the_verdict_on_a_faulty_library_is_its_remedy() -> None:
    broken = {"version": "9.9", "works": False, "problem": "it was compiled with AMX", "rebuild": "CMAKE_ARGS=x pip"}
    assert judged(findings(broken)) == (False, "llama.cpp does not work: it was compiled with AMX", "CMAKE_ARGS=x pip")
    advice = diagnosis.advise(findings(broken))
    assert "build it for this machine: CMAKE_ARGS=x pip" in advice


def test_the_verdict_on_vllm() -> None:
    assert judged(findings(vllm={"version": "0.32.0", "works": None, "problem": "not tested"})) == (
        True,
        "vLLM 0.32.0 (supported, not tried)",
        "specplug serve --profile vllm org/model",
    )
    old = {"version": "0.1.0", "works": False, "problem": "vllm 0.1.0 is not supported"}
    assert judged(findings(vllm=old))[:2] == (False, "vllm 0.1.0 is not supported")


def test_an_idle_gpu_and_unused_instructions_are_advice() -> None:
    report = findings(WORKING | {"unused": "AVX-512"})
    report["machine"]["gpus"] = [{"name": "Some GPU"}]
    advice = diagnosis.advise(report)
    assert any("does not use the processor's AVX-512" in line for line in advice)
    assert any("the GPU (Some GPU) is not used" in line for line in advice)


def test_the_last_line_is_the_verdict_and_json_has_its_fields(tmp_path: Path) -> None:
    done = subprocess.run([SPECPLUG, "doctor"], capture_output=True, text=True, timeout=120)
    found = json.loads(subprocess.run([SPECPLUG, "doctor", "--json"], capture_output=True, timeout=120).stdout)
    verdict = found["verdict"]
    state = "ready" if verdict["ready"] else "not ready"
    assert done.stdout.splitlines()[-1] == f"{state}: {verdict['text']}. Next: {verdict['next']}"
    assert (found["machine"]["threads"], found["machine"]["limit"]) == (core_limit().cores, core_limit().reason)
    assert {"cache", "config", "data", "state"} <= found["folders"].keys()
    assert 0 < found["folders"]["cache"]["bytes"] < 4 << 20, "the tiny model on which the library was tried"
    assert found["remove"] is not None and found["folders"]["config"]["bytes"] == 0
    assert core_limit().reason in done.stdout


# -- profiles and folders --------------------------------------------------------------------------------------------


def test_a_profile_lacks_its_engine_its_drafter_or_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specplug_cli.profile_requirements.versions.installed", lambda: None)
    monkeypatch.setattr("specplug.models.packaged_models.find_spec", lambda name: None)
    assert lacking("default") is None
    assert lacking("vllm") == "needs vLLM"
    assert lacking("llama3-vocabtrim-cpu") == "not downloaded, not built"
    assert lacking("qwen-coder-pair") == "not downloaded"
    monkeypatch.setattr("specplug_cli.profile_requirements.versions.installed", lambda: ("vllm", "0.32.0"))
    assert lacking("vllm") is None and lacking("llama3-vocabtrim") == "not downloaded, not built"


def test_a_built_drafter_is_not_lacking(tmp_path: Path) -> None:
    name = "llama3-vocabtrim-cpu"
    refs = [spec.options["model"] for spec in profile.load(name).proposers if "model" in spec.options]
    folder = kept_folders.folders.data_folder() / "drafters" / refs[0].removeprefix("drafter:")
    assert lacking(name) == "not downloaded, not built"
    folder.mkdir(parents=True)
    (folder / drafter_folders.MANIFEST).write_text("{}")
    assert lacking(name) == "not downloaded"


def test_profiles_that_lack_something_are_marked_where_they_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = subprocess.run([SPECPLUG, "profiles", "list"], capture_output=True, text=True, timeout=60).stdout
    lines = {line.split()[0]: line for line in listed.splitlines()}
    assert "[not downloaded, not built]" in lines["llama3-vocabtrim-cpu"] and "[" not in lines["default"]
    documents = json.loads(subprocess.run([SPECPLUG, "profiles", "list", "--json"], capture_output=True).stdout)
    lacks = {document["name"]: document["lacking"] for document in documents}
    assert lacks["llama3-vocabtrim-cpu"] == "not downloaded, not built" and lacks["default"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="the XDG variables have an effect on Linux only")
def test_folders_are_reported_with_their_size_and_removed_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "specplug"
    (folder / "cost").mkdir(parents=True)
    (folder / "cost" / "a.json").write_bytes(b"x" * 1000)
    (folder / "b.json").write_bytes(b"x" * 500)
    profile.save(Profile("mine", proposers=(ProposerSpec("none"),)), profile.user_folder() / "mine.yaml")
    found = kept_folders.kept_folders()
    assert found["cache"].bytes == 1500 and found["cache"].path == str(folder)
    assert found["config"].bytes > 0 and found["data"].bytes == found["state"].bytes == 0
    command = kept_folders.removal(found.values())
    assert command == f"rm -r {folder} {tmp_path / 'config' / 'specplug'}"
    subprocess.run(shlex.split(command), check=True)
    assert kept_folders.removal(kept_folders.kept_folders().values()) is None


def test_a_folder_that_a_variable_names_is_reported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPLUG_PROFILES", str(tmp_path / "elsewhere"))
    found = kept_folders.kept_folders()["profiles"]
    assert found.path == str(tmp_path / "elsewhere") and "SPECPLUG_PROFILES" in found.holds


def test_signals_are_named() -> None:
    """Without this, a platform with another text for SIGILL would fail the tests above only."""
    assert signal.strsignal(signal.SIGILL) == "Illegal instruction"
