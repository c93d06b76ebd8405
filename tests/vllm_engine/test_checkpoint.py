"""The packaged model's checkpoint, compared with results of llama-cpp-python 0.3.36 for the same GGUF file."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from specplug.errors import EngineError, UsageError
from specplug.models.references import resolve
from specplug.transforms import dequantise as module
from specplug.transforms.dequantise import checkpoint_of, dequantise

pytestmark = pytest.mark.vllm

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_checkpoint.py"
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]

# fmt: off
TOKENS = {  # llama_tokenize on the GGUF
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "In 2024 he paid  12345.67 euros,\n\n  then 3 more: ½ ٣": [
        788, 216, 34, 32, 34, 36, 384, 5940, 256, 33, 34, 35, 36, 37, 30, 38, 39, 39236, 28, 8866, 965, 216, 35, 540,
        42, 216, 16738, 216, 164, 113,
    ],
    "def f(x):\n    return x  * 10\n\t\t1": [
        1604, 275, 24, 104, 727, 472, 1003, 1792, 216, 1672, 216, 33, 32, 3558, 33,
    ],
    "naïve café 日本語 😀 don't I'll": [
        3546, 46494, 37366, 17097, 241, 115, 40993, 179, 120, 248, 40303, 218, 1326, 982, 339, 3060,
    ],
}
CHAT = [  # QUESTION in the GGUF's chat template, which adds its own system message
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198,
    1, 4093, 198, 1780, 314, 216, 33, 34, 1232, 216, 35, 32, 47, 2, 198, 1, 520, 9531, 198,
]
ANSWER = [  # the greedy answer, from the GGUF in f32: "12 + 30 = 32 ... classic example of arithmetic operations"
    33, 34, 1232, 216, 35, 32, 446, 216, 35, 34, 198, 198, 1348, 314, 253, 8170, 1183, 282, 20270, 4261, 1036, 3235,
    1592, 30, 2,
]
END_TOKENS = {0, 2, 4}  # llama_vocab_is_eog
# fmt: on


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("text", TOKENS)
def test_text_has_the_same_tokens(tokenizer: Any, text: str) -> None:
    assert tokenizer(text).input_ids == TOKENS[text]
    assert tokenizer.decode(TOKENS[text]) == text


def test_a_chat_has_the_same_tokens(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True).input_ids == CHAT


def test_the_end_tokens_are_the_same(checkpoint: Path, tokenizer: Any) -> None:
    ends = read(checkpoint / "generation_config.json")["eos_token_id"]
    assert set(ends) == END_TOKENS
    assert ends[0] == tokenizer.eos_token_id == read(checkpoint / "config.json")["eos_token_id"] == 2
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (1, 2)


def test_it_is_a_plain_float32_checkpoint_without_paths_of_its_source(checkpoint: Path) -> None:
    import torch
    from safetensors.torch import load_file

    config = read(checkpoint / "config.json")
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert "quantization_config" not in config
    assert {tensor.dtype for tensor in load_file(checkpoint / "model.safetensors").values()} == {torch.float32}
    for path in checkpoint.iterdir():
        if path.suffix in (".json", ".jinja"):
            text = path.read_text(encoding="utf-8")
            assert str(checkpoint.parent) not in text and "model.gguf" not in text, path.name


def test_a_greedy_answer_equals_llama_cpps(model: Any) -> None:
    import torch

    out = model.generate(torch.tensor([CHAT]), do_sample=False, max_new_tokens=40)
    assert out[0, len(CHAT) :].tolist() == ANSWER


def test_the_script_uses_no_network_and_writes_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    program = (
        "import os, runpy, socket, sys\n"
        "def refuse(*_): raise SystemExit('the script used the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "os.environ.pop('HF_HUB_OFFLINE', None)\n"
        f"sys.argv = ['make_checkpoint.py', {str(tmp_path / 'out')!r}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert written == {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def test_a_checkpoint_is_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four threads ask for it at the same time and one later, and a killed process has left a partial checkpoint."""
    written = []

    def write(gguf: Path, out: Path, dtype: str) -> None:
        written.append((gguf, dtype))
        assert not list(out.parent.glob(".*.killed"))
        out.mkdir()

    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "specplug")
    monkeypatch.setattr(module, "dequantise", write)
    name = checkpoint_of("demo:smollm2", "bfloat16").name
    written.clear()
    (tmp_path / "specplug" / "checkpoints" / name).rmdir()
    (tmp_path / "specplug" / "checkpoints" / f".{name}.killed" / "checkpoint").mkdir(parents=True)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(checkpoint_of, ["demo:smollm2"] * 4, ["bfloat16"] * 4))
    assert {*paths, checkpoint_of("demo:smollm2", "bfloat16")} == {tmp_path / "specplug" / "checkpoints" / name}
    assert written == [(resolve("demo:smollm2"), "bfloat16")]
    assert checkpoint_of("demo:smollm2").name != name
    assert len(written) == 2


def test_a_folder_is_its_own_checkpoint(checkpoint: Path) -> None:
    assert checkpoint_of(str(checkpoint)) == checkpoint


def changed(path: Path, old: bytes, new: bytes) -> Path:
    """A copy of the packaged model at `path`, with `old` replaced by `new` once."""
    content = resolve("demo:smollm2").read_bytes()
    assert len(old) == len(new) and old in content
    path.write_bytes(content.replace(old, new, 1))
    return path


def gguf_string(value: bytes) -> bytes:
    """A string as GGUF stores it, with its length, so that no longer string with the same start is found."""
    return len(value).to_bytes(8, "little") + value


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (gguf_string(b"smollm"), gguf_string(b"smulla"), "transformers does not split text like smulla"),
        (gguf_string(b"gpt2"), gguf_string(b"gptx"), "cannot be written as a checkpoint .ValueError: .*gptx"),
        (b"blk.7.attn_q.weight", b"blk.7.attn_x.weight", r"finds no model\.layers\.7\.self_attn\.q_proj\.weight in it"),
    ],
    ids=["pre-tokenizer", "tokenizer", "tensor"],
)
def test_a_model_that_transformers_cannot_read_is_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        dequantise(changed(tmp_path / "changed.gguf", old, new), tmp_path / "outs" / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("outs/*"))


def test_a_damaged_file_and_an_unknown_dtype_are_refused(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(resolve("demo:smollm2").read_bytes()[:-1000])
    for dtype, message in {
        "float32": "truncated: 1000 of 98362432 bytes are missing",
        "int8": "dtype 'int8' is unknown",
    }.items():
        with pytest.raises(UsageError, match=message) as caught:
            dequantise(cut, tmp_path / "outs" / "out", dtype)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("outs/*"))


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_no_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: BaseException | type[BaseException]
) -> None:
    def fail(gguf: Path, partial: Path, dtype: str) -> None:
        (partial / "checkpoint").mkdir()
        (partial / "checkpoint" / "model.safetensors").write_bytes(b"partial")
        assert not (tmp_path / "out").exists()
        raise reason

    monkeypatch.setattr(module, "_write", fail)
    with pytest.raises((KeyboardInterrupt, EngineError)) as caught:
        dequantise(resolve("demo:smollm2"), tmp_path / "out")
    assert caught.type is KeyboardInterrupt or "No space left on device" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already; name a new folder"):
        dequantise(resolve("demo:smollm2"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in ("gguf", "accelerate") else True)
    with pytest.raises(EngineError, match=r"needs accelerate, gguf, not installed; pip install 'specplug\[checkpoint"):
        dequantise(resolve("demo:smollm2"), tmp_path / "out")
