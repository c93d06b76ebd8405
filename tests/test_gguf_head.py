"""Trimmed GGUF files: their content, that stock llama.cpp runs them, and that their logits equal the full model's."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.models import drafter_folders
from specplug.models.references import tokenizer_hash
from specplug.transforms.kept_ids import by_size

pytestmark = pytest.mark.llama


@pytest.fixture(scope="module")
def ids(demo_path: Path) -> IntArray:
    """Every third token, and those that are always kept."""
    from specplug.transforms.gguf_head import vocabulary

    counts = np.zeros(49152, dtype=np.int64)
    counts[::3] = 1
    return by_size(counts, vocabulary(demo_path).always_kept(), 8192)


@pytest.fixture(scope="module")
def trimmed(formats: dict[str, Path], ids: IntArray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from specplug.transforms.gguf_head import trim

    folder = tmp_path_factory.mktemp("trimmed")
    for name, path in formats.items():
        trim(path, ids, folder / name)
    return {name: folder / name for name in formats}


def tokens_of(seed: int, count: int = 40) -> IntArray:
    return np.random.default_rng(seed).integers(0, 49152, count).astype(np.int32)


@pytest.mark.parametrize("name", ["f32", "bf16", "q8_0", "q4_0"])
def test_rows_of_the_head_are_the_sources_bytes(
    name: str, formats: dict[str, Path], trimmed: dict[str, Path], ids: IntArray
) -> None:
    from gguf import GGUFReader

    full = {tensor.name: tensor for tensor in GGUFReader(formats[name]).tensors}
    cut = {tensor.name: tensor for tensor in GGUFReader(trimmed[name] / "model.gguf").tensors}
    (table,) = GGUFReader(trimmed[name] / "embeddings.gguf").tensors
    assert np.array_equal(table.data, full["token_embd.weight"].data)
    assert np.array_equal(cut["token_embd.weight"].data, full["token_embd.weight"].data[ids])
    assert full.keys() == cut.keys()
    for tensor in full.keys() - {"token_embd.weight"}:
        assert np.array_equal(cut[tensor].data, full[tensor].data)
        assert cut[tensor].tensor_type == full[tensor].tensor_type


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("name", ["f32", "bf16", "q8_0", "q4_0"])
def test_logits_of_kept_rows_equal_those_of_the_full_model_bit_for_bit(
    name: str, rows: int, formats: dict[str, Path], trimmed: dict[str, Path], ids: IntArray
) -> None:
    from specplug.engines.llama_cpp.context import open_context
    from specplug.engines.llama_cpp.drafters.input_table import InputTable
    from specplug.engines.llama_cpp.model import open_model
    from specplug.profile import Runtime

    runtime = Runtime(threads=2, flash_attention=True, kv_type="bf16")
    table = InputTable(trimmed[name] / "embeddings.gguf", 1.0)
    tokens = tokens_of(rows)
    with (
        open_model(formats[name]) as full,
        open_model(trimmed[name] / "model.gguf") as cut,
        open_context(full, runtime, cells=256, num_ids=1, max_rows=8) as one,
        open_context(cut, runtime, cells=256, num_ids=1, max_rows=8, inputs=table) as other,
    ):
        for at in range(0, len(tokens), rows):
            seen = []
            for context in (one, other):
                context.clear_batch()
                context.add_span(tokens[at : at + rows], at, 0, wanted=True)
                context.decode()
                seen.append(np.array(context.logits(context.rows)))
            assert np.array_equal(seen[0][:, ids], seen[1])


def test_stock_llama_cpp_loads_the_file(trimmed: dict[str, Path], ids: IntArray) -> None:
    from llama_cpp import Llama

    llama = Llama(str(trimmed["q8_0"] / "model.gguf"), n_ctx=64, verbose=False)
    try:
        assert llama.n_vocab() == len(ids)
        llama.eval([1, 5, 9])
        assert llama.n_tokens == 3
        assert 0 <= llama.sample(temp=0.0) < len(ids)
    finally:
        llama.close()


def test_tokenizer_lists_and_named_tokens_are_trimmed_alike(
    demo_path: Path, trimmed: dict[str, Path], ids: IntArray
) -> None:
    from gguf import GGUFReader

    full, cut = (GGUFReader(path) for path in (demo_path, trimmed["f32"] / "model.gguf"))
    texts, kept = (reader.fields["tokenizer.ggml.tokens"].contents() for reader in (full, cut))
    assert kept == [texts[id] for id in ids.tolist()]
    for key in ("bos", "eos", "unknown", "padding"):
        one, other = (reader.fields[f"tokenizer.ggml.{key}_token_id"].contents() for reader in (full, cut))
        assert ids[other] == one
    assert cut.fields["llama.vocab_size"].contents() == len(ids)


def test_the_manifest_describes_the_folder(formats: dict[str, Path], trimmed: dict[str, Path], ids: IntArray) -> None:
    manifest, kept = drafter_folders.read(trimmed["q4_0"])
    assert np.array_equal(kept, ids)
    assert manifest.tokenizer == tokenizer_hash(formats["q4_0"])
    assert (manifest.format, manifest.num_tokens, manifest.rows, manifest.input_scale) == ("gguf", 49152, 8192, 1.0)
    assert set(manifest.files) == {"model.gguf", "embeddings.gguf", "ids.npy"}


@pytest.mark.parametrize("four_bits", ["q4_0", "iq4_nl"])
def test_quantised_drafters_have_four_bits_in_their_layers_and_eight_in_their_head(
    four_bits: str, formats: dict[str, Path], ids: IntArray, tmp_path: Path
) -> None:
    from gguf import GGMLQuantizationType, GGUFReader

    from specplug.transforms.gguf_head import head_shape, trim

    trim(formats["bf16"], ids, tmp_path / "small", quantize=four_bits)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "small" / "model.gguf").tensors}
    assert tensors["token_embd.weight"].tensor_type == GGMLQuantizationType.Q8_0
    assert tensors["blk.3.ffn_down.weight"].tensor_type == GGMLQuantizationType[four_bits.upper()]
    shape = head_shape(tmp_path / "small" / "model.gguf")
    assert (shape.num_tokens, shape.width, shape.tied, shape.row_bytes) == (8192, 576, True, 576 // 32 * 34)
    (table,) = GGUFReader(tmp_path / "small" / "embeddings.gguf").tensors
    assert table.tensor_type == GGMLQuantizationType.BF16


def test_a_drafters_blocks_are_scaled_by_least_squares(formats: dict[str, Path], tmp_path: Path) -> None:
    """The weights in 4 bits are nearer to the original ones than those of llama.cpp's default q4_0."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    from specplug.transforms.requantise import requantise

    requantise(formats["f32"], tmp_path / "drafter.gguf", "q4_0", least_squares=True)
    name, errors = "blk.3.ffn_down.weight", []
    (original,) = (tensor.data for tensor in GGUFReader(formats["f32"]).tensors if tensor.name == name)
    for path in (formats["q4_0"], tmp_path / "drafter.gguf"):
        (small,) = (tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
        errors.append(np.square(dequantize(small.data, small.tensor_type) - original).mean())
    assert errors[1] < 0.9 * errors[0]


def test_head_shape_counts_every_weight_that_a_step_reads(formats: dict[str, Path]) -> None:
    from gguf import GGUFReader

    from specplug.transforms.gguf_head import head_shape

    shape = head_shape(formats["bf16"])
    assert shape.row_bytes == 2 * 576
    everything = sum(int(tensor.n_bytes) for tensor in GGUFReader(formats["bf16"]).tensors)
    assert shape.step_bytes(49152) == everything


def test_special_blank_and_digit_tokens_are_always_kept(demo_path: Path) -> None:
    from specplug.transforms.gguf_head import vocabulary

    found = vocabulary(demo_path)
    always = set(found.always_kept().tolist())
    by_piece = {piece: id for id, piece in enumerate(found.pieces)}
    for piece in (b"0", b"9", b" ", b"\n", b"\n\n"):
        assert by_piece[piece] in always
    assert {0, 1, 2} <= always  # <|endoftext|>, <|im_start|>, <|im_end|>
    assert by_piece[b" the"] not in always


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "not ascending ids"), ([5, 4], "not ascending"), ([1, 49152], "below 49152"), ([-1, 3], "below 49152")],
)
def test_invalid_ids_are_refused(demo_path: Path, ids: list[int], message: str, tmp_path: Path) -> None:
    from specplug.transforms.gguf_head import trim

    with pytest.raises(UsageError, match=message):
        trim(demo_path, np.array(ids, dtype=np.int32), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    from specplug.transforms.gguf_head import head_shape, trim

    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "oddity")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for call in (lambda: head_shape(path), lambda: trim(path, np.array([1], dtype=np.int32), tmp_path / "out")):
        with pytest.raises(UsageError, match="architecture oddity is not known; known: llama"):
            call()


def test_a_folder_in_use_is_refused_and_unchanged(demo_path: Path, ids: IntArray, tmp_path: Path) -> None:
    from specplug.transforms.gguf_head import trim

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="exists already"):
        trim(demo_path, ids, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"


@pytest.mark.parametrize("quantize", [None, "q4_0"])
def test_a_full_disk_leaves_nothing(demo_path: Path, tmp_path: Path, quantize: str | None) -> None:
    """A file size limit of 20 MB in a separate process stands for a full disk."""
    program = f"""
import resource, signal, sys
import numpy as np
from pathlib import Path
from specplug.errors import SpecplugError
from specplug.transforms.gguf_head import trim
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))
try:
    ids = np.arange(4096, dtype=np.int32)
    trim(Path({str(demo_path)!r}), ids, Path({str(tmp_path / "out")!r}), quantize={quantize!r})
except SpecplugError as error:
    print(error.exit_code, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("1 ") and "out: cannot be written" in done.stdout, done
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_records_the_scale_of_gemmas_embeddings(tmp_path: Path) -> None:
    """In Gemma llama.cpp multiplies the embeddings of tokens by sqrt(width), but not those that a caller provides."""
    from gguf import GGUFWriter

    from specplug.transforms.gguf_head import trim

    path = tmp_path / "gemma.gguf"
    writer = GGUFWriter(path, "gemma3")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(64)])
    writer.add_tensor("token_embd.weight", np.ones((64, 640), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    manifest = trim(path, np.arange(32, dtype=np.int32), tmp_path / "out")
    assert manifest.input_scale == pytest.approx(640**0.5)


# -- folders that were changed or are invalid -------------------------------------------------------------------------


def test_a_changed_file_is_detected(trimmed: dict[str, Path], tmp_path: Path) -> None:
    from shutil import copytree

    folder = copytree(trimmed["q4_0"], tmp_path / "copy")
    with open(folder / "model.gguf", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UsageError, match=r"model\.gguf: its SHA-256 is [0-9a-f]{12}, the manifest says [0-9a-f]{12}"):
        drafter_folders.read(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema", 2, "not a manifest of schema 1"),
        ("format", "zip", "format 'zip' is none of gguf, checkpoint"),
        ("rows", "many", "rows is missing or has the wrong type"),
        ("rows", 0, "its ids are missing"),
        ("files", {"../../etc/passwd": "0"}, "is no name of a file in the folder"),
        ("extra", 1, "unknown keys: extra"),
    ],
)
def test_invalid_manifests_are_refused(
    trimmed: dict[str, Path], tmp_path: Path, key: str, value: object, message: str
) -> None:
    data = json.loads((trimmed["q4_0"] / "specplug.json").read_text())
    (tmp_path / "specplug.json").write_text(json.dumps(data | {key: value}))
    with pytest.raises(UsageError, match=message):
        drafter_folders.read(tmp_path)


def test_the_message_for_a_missing_drafter_has_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="not built yet; run: specplug build vocab-trim demo:gemma3 --size 16384 --out"
    ):
        drafter_folders.resolve(str(tmp_path / "none"), ["demo:gemma3", "--size", "16384"])
    with pytest.raises(UsageError, match="'a; rm -rf b'"):  # a profile from elsewhere cannot smuggle in a command
        drafter_folders.resolve(str(tmp_path / "none"), ["a; rm -rf b"])
    with pytest.raises(UsageError, match="no name for a drafter"):
        drafter_folders.resolve("drafter:../x")
