"""Trying the native library in a child: with the installed one, and with stubs that end their process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from specplug import profile as profiles
from specplug.engines.llama_cpp import library_check
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.library_check import WAYS, check_model, findings
from specplug.engines.llama_cpp.model import open_model
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.engines.llama_cpp.tiny_model import MOST_BYTES, Shape, write_tiny_model
from specplug.errors import EngineError, UsageError
from specplug.models.gguf_header import WEIGHT_TYPES, Header, read_header
from specplug.profile import Runtime
from specplug_cli import examination

pytestmark = pytest.mark.llama

STUB = """
import os, signal, sys
if "specplug.engines.llama_cpp.trial" in sys.orig_argv:
    import llama_cpp.llama_cpp as ll
    opened = {}
    load, context, decode = ll.llama_model_load_from_file, ll.llama_init_from_model, ll.llama_decode

    def load_model(path, params):
        opened.update(repack=params.use_extra_bufts, path=path)
        return load(path, params)

    def init(model, params):
        opened["flash"] = params.flash_attn_type == ll.LLAMA_FLASH_ATTN_TYPE_ENABLED
        return context(model, params)

    def decode_batch(*arguments):
        if CONDITION:
            os.kill(os.getpid(), signal.NAME)
        return decode(*arguments)

    ll.llama_model_load_from_file, ll.llama_init_from_model, ll.llama_decode = load_model, init, decode_batch
"""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No result is known, and nothing was said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library_check, "_KNOWN", {})
    monkeypatch.setattr(library_check, "_TOLD", set())
    return tmp_path / "cache" / "specplug" / "library"


def install_stub(folder: Path, monkeypatch: pytest.MonkeyPatch, condition: str, name: str = "SIGILL") -> None:
    """A library whose decoding ends the process with a signal where a condition holds."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(STUB.replace("CONDITION", condition).replace("NAME", name))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def header(*types: int, **numbers: int) -> Header:
    return Header("llama", 1, 1, 1, "", numbers=numbers, matrix_types=frozenset(types))


# -- the tiny model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(WEIGHT_TYPES))
def test_every_type_of_weights_gives_a_small_model_that_opens(kind: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, [kind], Shape(sharing=7, head=64))
    assert path.stat().st_size <= MOST_BYTES + (64 << 10)
    assert kind in read_header(path).matrix_types
    with open_model(path) as model:
        assert model.num_tokens == 64


@pytest.mark.parametrize("head", [32, 48, 64, 80, 96, 128, 256])
def test_every_head_size(head: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, [8, 12], Shape(sharing=4, head=head))
    assert read_header(path).numbers["attention.key_length"] == head


# -- the installed library -------------------------------------------------------------------------------------------


def test_the_installed_library_passes_and_is_remembered(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings(header(8, **{"attention.head_count": 8, "attention.head_count_kv": 2}), compare=True)
    assert found.signal is None and found.way == 0
    assert found.equal_rows == 25, "kernels of q8_0 round alike for every number of rows"
    assert {(on, kind) for on, kind, _ in found.kernels} == {
        (True, "f16"),
        (False, "f16"),
        (True, "bf16"),
        (False, "bf16"),
    }
    assert all(ms > 0 for *_, ms in found.kernels)
    monkeypatch.setattr(library_check, "_KNOWN", {})
    install_stub(tmp_path / "stub", monkeypatch, "True")  # a further child would now end
    again = findings(header(8, **{"attention.head_count": 8, "attention.head_count_kv": 2}), compare=True)
    assert again == found


def test_bf16_weights_round_otherwise_for_several_rows() -> None:
    assert findings(header(30), compare=True).equal_rows < 25


@pytest.mark.parametrize("content", ["", "{", "[]", '{"way": 9, "signal": null, "equal_rows": 1, "kernels": []}', "\0"])
def test_a_damaged_result_is_found_again(content: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(header(8))
    for path in empty_cache.glob("*.json"):
        path.write_text(content)
    monkeypatch.setattr(library_check, "_KNOWN", {})
    again = findings(header(8))
    assert (again.way, again.signal, again.equal_rows) == (found.way, None, found.equal_rows)


# -- libraries that end their process --------------------------------------------------------------------------------


def test_a_faulty_kernel_is_avoided_and_said_once(
    demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_stub(tmp_path / "stub", monkeypatch, 'opened["repack"]')
    said: list[str] = []
    way = check_model(demo_path, Runtime(), said.append)
    assert (way.repack, way.flash_attention) == (False, True)
    assert len(said) == 1 and "\n" not in said[0]
    assert "Illegal instruction" in said[0] and "repack: false" in said[0] and "--no-cache-dir" in said[0]
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setattr(library_check, "_KNOWN", {})
    assert check_model(demo_path, Runtime(), said.append) == way, "it is remembered"
    assert len(said) == 1


def test_the_first_way_that_helps_is_taken(demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_stub(tmp_path / "stub", monkeypatch, 'opened["flash"]', "SIGSEGV")
    found = findings(read_header(demo_path))
    assert (found.way, found.signal) == (2, "SIGSEGV")
    with open_model(demo_path) as model:
        assert model.way == WAYS[2] and model.way.repack
        for name in ("none", "default", "serve"):
            for many in (False, True):
                assert with_settings(profiles.load(name), model, many=many).runtime.flash_attention is False
        with pytest.raises(EngineError, match="exact needs flash attention, which ends the process here"):
            with_settings(profiles.load("exact"), model)
        asked = Runtime(threads=1, flash_attention=True, kv_type="f16")
        with open_context(model, asked, cells=256, num_ids=2, max_rows=4) as context:
            assert context.read(np.arange(4, dtype=np.int32)).shape == (1, model.num_tokens)


def test_a_library_that_always_ends_the_process_is_refused(
    demo_path: Path, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_stub(tmp_path / "stub", monkeypatch, "True", "SIGABRT")
    with pytest.raises(
        EngineError, match=r"ends the process \(abort\).*build a sound one for this machine: "
    ) as caught:
        check_model(demo_path, Runtime())
    assert caught.value.exit_code == 5
    assert not list(empty_cache.glob("*.json")), "the next library is tried again"


def test_a_child_that_is_killed_from_outside_shows_nothing(
    demo_path: Path, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory runs out."""
    install_stub(tmp_path / "stub", monkeypatch, "True", "SIGKILL")
    said: list[str] = []
    assert check_model(demo_path, Runtime(), said.append) == WAYS[0]
    assert len(said) == 1 and said[0].startswith("the installed llama.cpp could not be tried before it is used: ")
    assert not list(empty_cache.glob("*.json"))
    assert examination.decoding(library_check.common_findings)["decoded"] is False


def test_a_model_of_another_architecture_is_opened_in_a_child_first(
    demo_path: Path, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_check, "TESTED", frozenset())
    install_stub(tmp_path / "stub", monkeypatch, 'opened["path"].endswith(b"Q4_1.gguf")', "SIGABRT")
    with pytest.raises(UsageError, match=r"llama.cpp ends the process \(SIGABRT\) when it decodes this llama model"):
        check_model(demo_path, Runtime())
    monkeypatch.delenv("PYTHONPATH")
    check_model(demo_path, Runtime())
    monkeypatch.setattr(library_check, "_KNOWN", {})
    install_stub(tmp_path / "stub", monkeypatch, "True", "SIGABRT")  # a further child would end
    check_model(demo_path, Runtime())
    with pytest.raises(EngineError):
        check_model(demo_path, Runtime(gpu_layers=-1))  # on a GPU nothing was tried yet


def run(folder: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "specplug_cli.main", "run", "--max-tokens", "3", *arguments, "Hi"],
        env=os.environ | {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(cache)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_run_answers_with_a_library_that_has_a_faulty_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_stub(tmp_path / "stub", monkeypatch, 'opened["repack"]')
    done = run(tmp_path / "stub", tmp_path / "cache")
    assert done.returncode == 0 and done.stdout.strip()
    assert done.stderr.count("Illegal instruction") == 1


def test_a_library_that_does_not_survive_its_import_is_refused_in_one_line(tmp_path: Path) -> None:
    package = tmp_path / "stub" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    done = run(tmp_path / "stub", tmp_path / "cache", "--profile", "none")
    assert done.returncode == 5 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "Illegal instruction" in line and "when it is imported" in line
