"""Opening a model: llama.cpp's reason where it fails, the memory that is needed, and what C code prints to stderr."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import psutil
import pytest

pytest.importorskip("llama_cpp")

from specplug import profile
from specplug.engines.llama_cpp.drafters import opening
from specplug.engines.llama_cpp.drafters.opening import open_target
from specplug.engines.llama_cpp.engine_settings import can_offload
from specplug.engines.llama_cpp.model import captured_stderr, open_model
from specplug.errors import UsageError
from specplug.profile import Runtime

pytestmark = pytest.mark.llama

SPECPLUG = str(Path(sys.executable).with_name("specplug"))


def written(path: Path, architecture: str = "llama", *, parts: int = 0) -> Path:
    """A file with one tensor, which is not enough for a model. parts: parts in all, of which it is the first."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("none")
    if parts:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", 2)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# -- llama.cpp's own reason --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "architecture", "parts", "reason"),
    [
        ("foo.gguf", "fooarch", 0, "unknown model architecture: 'fooarch'"),
        ("lacks.gguf", "llama", 0, "tensor 'output_norm.weight' not found"),
        ("m-00001-of-00002.gguf", "llama", 2, "m-00002-of-00002.gguf"),
    ],
)
def test_the_message_carries_llama_cpps_reason(
    name: str, architecture: str, parts: int, reason: str, tmp_path: Path
) -> None:
    path = written(tmp_path / name, architecture, parts=parts)
    with pytest.raises(UsageError) as caught:
        open_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: llama.cpp cannot load this model: ") and reason in message
    assert "\n" not in message and "error loading model" not in message and "check_tensor_dims" not in message


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused_before_it_is_opened(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    plain = profile.load("none")
    runtime = Runtime(threads=1, context=512)
    with pytest.raises(UsageError, match=rf"^{demo_path.name} needs about .* GiB are free; use a smaller model"):
        open_target(demo_path, [plain], runtime, print)
    with pytest.raises(UsageError, match="use a smaller model"):
        open_target(demo_path, [], runtime, print)  # as tune does without drafters
    offloading = Runtime(threads=1, context=512, gpu_layers=1)
    if not can_offload():
        with pytest.raises(UsageError, match="use a smaller model"):
            open_target(demo_path, [plain], offloading, print)
    monkeypatch.setattr(opening, "can_offload", lambda: True)
    open_target(demo_path, [plain], offloading, lambda text: None).close()


# -- stderr ------------------------------------------------------------------------------------------------------------


def test_lines_of_c_code_are_captured_and_stderr_is_restored(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_stderr() as lines:
        os.write(2, b"one\ntw\xff\n")
    assert lines == ["one", "tw\N{REPLACEMENT CHARACTER}"]
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"


@pytest.mark.parametrize("closed", ["", "2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_capturing_needs_neither_stderr_nor_a_temporary_folder(closed: str, tmp_path: Path) -> None:
    program = """
import os, sys, tempfile
from pathlib import Path
from specplug.engines.llama_cpp.model import captured_stderr
tempfile.tempdir = "/nonexistent"
before = [os.path.exists(f"/dev/fd/{number}") for number in range(3)]
with captured_stderr() as lines:
    os.write(2, b"said")
assert before == [os.path.exists(f"/dev/fd/{number}") for number in range(3)]
Path("found").write_text(",".join(lines))
"""
    script = f'cd "$0"; exec "$1" -c "$2" {closed}'
    done = subprocess.run(["bash", "-c", script, tmp_path, sys.executable, program], timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "found").read_text() == "said"


# -- byte order marks --------------------------------------------------------------------------------------------------


def test_files_and_stdin_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.gbnf").write_bytes(mark + b'root ::= "ok"')
    (tmp_path / "a.json").write_bytes(mark + b'{"enum":["fine"]}')
    expected = {"--grammar": (tmp_path / "a.gbnf", b"ok\n"), "--json-schema": (tmp_path / "a.json", b'"fine"\n')}
    for flag, (path, answer) in expected.items():
        command = [SPECPLUG, "run", "--profile", "none", "--threads", "1", "--max-tokens", "8", flag, path]
        done = subprocess.run(command, input=mark + b"hi", capture_output=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, answer), done.stderr
    shown = [SPECPLUG, "run", "--profile", "none", "--threads", "1", "--max-tokens", "1", "--json"]
    done = subprocess.run(shown, input=mark + b"hi", capture_output=True, timeout=120)
    assert b'"prompt": "hi"' in done.stdout
