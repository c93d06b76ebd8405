"""Checkpoints with trimmed heads, read back by the library `safetensors`. No engine is needed."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
from safetensors.numpy import save_file

from specplug.core import IntArray, int_array
from specplug.errors import UsageError
from specplug.models import drafter_folders
from specplug.models.references import tokenizer_hash
from specplug.transforms import tensor_files
from specplug.transforms.checkpoint_head import TRIMMED, head_shape, ids_with_rows, trim, vocabulary

V, WIDTH = 64, 8
KEPT = int_array([0, 3, 4, 17, 40, 63])
OFFSETS = [0, 2, 2, 14, 36, 58]
"""KEPT minus 0, 1, 2, …, computed by hand."""

Arrays = Mapping[str, npt.NDArray[Any]]


def numbers(*shape: int, seed: int = 0, dtype: str = "float32") -> npt.NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def read(path: Path) -> dict[str, Any]:
    """The dtype, shape and bytes of every tensor by name, as the library reads them."""
    return {
        name: (value["dtype"], tuple(value["shape"]), bytes(value["data"]))
        for name, value in safetensors.deserialize(path.read_bytes())
    }


def checkpoint(folder: Path, tensors: Arrays, config: Mapping[str, Any], *, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    names = sorted(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
    else:
        files = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": V, "hidden_size": WIDTH, **config}))
    return folder


def llama(folder: Path, *, tied: bool = False, shards: int = 1, dtype: str = "float32", **config: Any) -> Path:
    tensors = {
        "model.embed_tokens.weight": numbers(V, WIDTH, seed=1, dtype=dtype),
        "model.layers.0.mlp.up_proj.weight": numbers(12, WIDTH, seed=2, dtype=dtype),
        "model.norm.weight": numbers(WIDTH, seed=3, dtype="float32"),
    }
    if not tied:
        tensors["lm_head.weight"] = numbers(V, WIDTH, seed=4, dtype=dtype)
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied, **config}
    path = checkpoint(folder, tensors, config, shards=shards)
    (path / "tokenizer.json").write_text(json.dumps(byte_level()))
    (path / "tokenizer_config.json").write_text("{}")
    return path


def eagle3(folder: Path, ids: IntArray | None, *, head: bool = True, **config: Any) -> Path:
    """An EAGLE-3 head with rows for `ids`, or for all."""
    rows = V if ids is None else len(ids)
    tensors = {"fc.weight": numbers(WIDTH, 3 * WIDTH), "midlayer.self_attn.q_proj.weight": numbers(4, 2 * WIDTH)}
    if head:
        tensors["lm_head.weight"] = numbers(rows, WIDTH, seed=5)
    if ids is not None:
        tensors["d2t"] = ids.astype(np.int64) - np.arange(rows)
        tensors["t2d"] = np.isin(np.arange(V), ids)
        config = {"draft_vocab_size": rows, **config}
    return checkpoint(folder, tensors, {"architectures": ["LlamaForCausalLMEagle3"], **config})


def byte_level() -> dict[str, Any]:
    """A byte-level vocabulary: in GPT-2's byte alphabet, `Ġ` is a space and `Ċ` a line feed."""
    vocab = {"a": 0, "Ġ": 1, "Ġthe": 2, "Ċ": 3, "7": 4, "Ã©": 5, "ab": 6}
    return {
        "model": {"type": "BPE", "vocab": vocab, "unk_token": None},
        "decoder": {"type": "ByteLevel"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]},
        "added_tokens": [
            {"id": 7, "content": "<|im_end|>", "special": True},
            {"id": 8, "content": "\t\t", "special": False},
            {"id": 9, "content": "<|reserved_special_token_3|>", "special": True},
            {"id": V, "content": "<image>", "special": True},
        ],
    }


# -- the bytes that tokens print -------------------------------------------------------------------------------------


def test_a_byte_level_vocabulary_prints_bytes(tmp_path: Path) -> None:
    found = vocabulary(llama(tmp_path / "m", bos_token_id=6, eos_token_id=[7, 8]))
    assert list(found.pieces) == [b"a", b" ", b" the", b"\n", b"7", "é".encode(), b"ab", b"", b"\t\t"] + [b""] * 55
    assert found.special == {6, 7, 8}, "the end token and the ids that the configuration names; no reserved token"
    assert found.always_kept().tolist() == [1, 3, 4, 6, 7, 8]


@pytest.mark.parametrize("unigram", [True, False])
def test_a_vocabulary_with_marks_for_spaces_prints_spaces(tmp_path: Path, unigram: bool) -> None:
    texts = ["<unk>", "<0x0A>", "\u2581the", "\u2581", "x", "<unused7>", "<end_of_turn>"]
    path = llama(tmp_path / "m")
    vocab: Any = [[text, 0.0] for text in texts] if unigram else {text: id for id, text in enumerate(texts)}
    data = {
        "model": {"vocab": vocab, "unk_token": None if unigram else "<unk>", "byte_fallback": True},
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": True},
            {"id": 5, "content": "<unused7>", "special": True},
        ],
    }
    (path / "tokenizer.json").write_text(json.dumps(data))
    found = vocabulary(path)
    assert list(found.pieces[:5]) == [b"", b"<0x0A>", b" the", b" ", b"x"]
    assert found.special == {0, 1, 6}


# -- the files written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tied", "shards", "dtype"), [(False, 1, "float32"), (True, 3, "float16"), (False, 2, "float16")]
)
def test_the_head_has_the_kept_rows_and_all_other_weights_are_unchanged(
    tmp_path: Path, tied: bool, shards: int, dtype: str
) -> None:
    source = llama(tmp_path / "m", tied=tied, shards=shards, dtype=dtype, rope_theta=5.0)
    made = trim(source, KEPT, tmp_path / "out", built={"calibration": "none"})
    found, before = read(tmp_path / "out" / "model.safetensors"), numbers(V, WIDTH, seed=1 if tied else 4, dtype=dtype)
    assert found.pop("lm_head.weight")[1:] == ((6, WIDTH), before[KEPT].tobytes())
    assert found.pop("d2t") == ("I64", (6,), np.array(OFFSETS, np.int64).tobytes())
    everything: dict[str, Any] = {}
    for path in source.glob("*.safetensors"):
        everything |= read(path)
    everything.pop("lm_head.weight", None)
    assert found == everything
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        "vocab_size": V, "hidden_size": WIDTH, "rope_theta": 5.0, "draft_vocab_size": 6, "tie_word_embeddings": False,
        "architectures": [TRIMMED["LlamaForCausalLM"]],
    }  # fmt: skip
    assert (made.format, made.kind, made.architecture) == ("checkpoint", "model", "LlamaForCausalLM")
    assert (made.num_tokens, made.rows, made.input_scale, made.built) == (V, 6, 1.0, {"calibration": "none"})
    assert made.tokenizer == tokenizer_hash(source) == tokenizer_hash(tmp_path / "out")
    manifest, ids = drafter_folders.read(tmp_path / "out")
    assert manifest == made and ids.tolist() == KEPT.tolist()
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"} < manifest.files.keys()


def test_bytes_of_every_format_are_copied_unchanged(tmp_path: Path) -> None:
    """This covers bfloat16, which NumPy lacks, and 8 bits. Every tensor is aligned in the new file, whatever its offset
    in the old one."""
    source = llama(tmp_path / "m")
    rng = np.random.default_rng(0)
    tensors = {  # the five bytes of the first tensor misalign the others
        "model.norm.weight": ("U8", [5], rng.bytes(5)),
        "lm_head.weight": ("BF16", [V, WIDTH], rng.bytes(2 * V * WIDTH)),
        "model.embed_tokens.weight": ("F32", [V, WIDTH], rng.bytes(4 * V * WIDTH)),
    }
    head, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(head).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    trim(source, KEPT, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    found = read(path)
    rows = tensors["lm_head.weight"][2]
    assert found["lm_head.weight"] == ("BF16", (6, WIDTH), b"".join(rows[16 * id : 16 * id + 16] for id in KEPT))
    assert found["model.norm.weight"] == ("U8", (5,), tensors["model.norm.weight"][2])
    assert found["model.embed_tokens.weight"][2] == tensors["model.embed_tokens.weight"][2]
    for name, tensor in tensor_files.tensors_of(path.parent).items():
        assert tensor.start % {"BF16": 2, "U8": 1, "F32": 4, "I64": 8}[tensor.dtype] == 0, name


def test_rows_that_exceed_one_piece_are_written_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "PIECE", 2 * 4 * WIDTH)
    trim(llama(tmp_path / "m"), KEPT, tmp_path / "out")
    found = read(tmp_path / "out" / "model.safetensors")
    assert found["lm_head.weight"][2] == numbers(V, WIDTH, seed=4)[KEPT].tobytes()
    assert found["model.embed_tokens.weight"][2] == numbers(V, WIDTH, seed=1).tobytes()


def test_a_step_reads_the_layers_and_the_rows(tmp_path: Path) -> None:
    layers = 4 * (12 * WIDTH + WIDTH)
    for tied in (False, True):
        shape = head_shape(llama(tmp_path / str(tied), tied=tied))
        assert (shape.num_tokens, shape.width, shape.tied, shape.row_bytes) == (V, WIDTH, tied, 4 * WIDTH)
        assert shape.body_bytes == layers
        assert shape.step_bytes(6) == layers + 6 * 4 * WIDTH


# -- EAGLE-3 heads ---------------------------------------------------------------------------------------------------


def test_an_eagle3_head_with_all_rows_is_trimmed(tmp_path: Path) -> None:
    source, target = eagle3(tmp_path / "e", None), llama(tmp_path / "t")
    made = trim(source, KEPT, tmp_path / "out", target=target)
    assert (made.kind, made.num_tokens, made.rows, made.tokenizer) == ("eagle3", V, 6, tokenizer_hash(target))
    found = read(tmp_path / "out" / "model.safetensors")
    assert found["lm_head.weight"][2] == numbers(V, WIDTH, seed=5)[KEPT].tobytes()
    assert found["d2t"][2] == np.array(OFFSETS, np.int64).tobytes()
    assert found["t2d"] == ("BOOL", (V,), bytes(id in KEPT for id in range(V)))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "vocab_size": V, "hidden_size": WIDTH, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 6,
    }  # fmt: skip


@pytest.mark.parametrize("shuffled", [False, True])
def test_an_eagle3_head_with_fewer_rows_is_trimmed_again(tmp_path: Path, shuffled: bool) -> None:
    """The ids of the new head are looked up in the map of the old one, whose rows may be in any order."""
    old_ids = int_array([1, 3, 17, 18, 30, 63])
    old_ids = old_ids[[3, 1, 5, 0, 2, 4]] if shuffled else old_ids
    source = eagle3(tmp_path / "e", old_ids)
    assert ids_with_rows(source).tolist() == [1, 3, 17, 18, 30, 63]
    made = trim(source, KEPT, tmp_path / "out", target=llama(tmp_path / "t"))
    assert made.rows == 3 and drafter_folders.read(tmp_path / "out")[1].tolist() == [3, 17, 63]
    found = read(tmp_path / "out" / "model.safetensors")
    rows = [old_ids.tolist().index(id) for id in (3, 17, 63)]
    assert found["lm_head.weight"][2] == numbers(6, WIDTH, seed=5)[rows].tobytes()
    assert found["d2t"][2] == np.array([3, 16, 61], np.int64).tobytes()
    shape = head_shape(source)
    assert (shape.num_tokens, shape.body_bytes) == (6, 4 * (3 * WIDTH * WIDTH + 8 * WIDTH))
    with pytest.raises(UsageError, match="its head has none of the 2 tokens"):
        trim(source, int_array([0, 2]), tmp_path / "none", target=tmp_path / "t")


def test_an_eagle3_head_with_every_row_has_no_map(tmp_path: Path) -> None:
    """vLLM's EAGLE-3 head has no parameter for a map where it has the full vocabulary."""
    trim(eagle3(tmp_path / "e", None), int_array(range(V)), tmp_path / "out", target=llama(tmp_path / "t"))
    assert not {"d2t", "t2d"} & read(tmp_path / "out" / "model.safetensors").keys()


def test_an_eagle3_head_without_an_output_head_uses_the_targets(tmp_path: Path) -> None:
    source = eagle3(tmp_path / "e", None, head=False)
    trim(source, KEPT, tmp_path / "out", target=llama(tmp_path / "t", tied=True))
    found = read(tmp_path / "out" / "model.safetensors")
    assert found["lm_head.weight"][2] == numbers(V, WIDTH, seed=1)[KEPT].tobytes()
    with pytest.raises(UsageError, match=r"has no lm_head\.weight; name the model that it drafts for"):
        trim(source, KEPT, tmp_path / "none")


def test_the_configuration_of_the_speculators_format_keeps_its_structure(tmp_path: Path) -> None:
    source = eagle3(tmp_path / "e", None, speculators_model_type="eagle3", architectures=["Eagle3DraftModel"])
    inner = {"vocab_size": V, "hidden_size": WIDTH, "model_type": "llama"}
    given = {"speculators_model_type": "eagle3", "transformer_layer_config": inner, "draft_vocab_size": V}
    (source / "config.json").write_text(json.dumps(given))
    assert trim(source, KEPT, tmp_path / "out", target=llama(tmp_path / "t")).kind == "eagle3"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == given | {"draft_vocab_size": 6}


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[], [-1, 2], [1, 1], [3, 2], [5, V]])
def test_invalid_ids_are_refused(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(UsageError, match=f"not ascending ids below {V}"):
        trim(llama(tmp_path / "m"), int_array(ids), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Gemma3ForConditionalGeneration", None])
def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, architecture: str | None) -> None:
    config = {"architectures": [architecture] if architecture else None}
    source = llama(tmp_path / "m", **config)
    for call in (lambda: trim(source, KEPT, tmp_path / "out"), lambda: head_shape(source)):
        with pytest.raises(UsageError, match=f"architecture {str(architecture).lower()}|architecture {architecture}"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_quantised_head_is_refused(tmp_path: Path) -> None:
    source = llama(tmp_path / "m")
    tensors = {"model.embed_tokens.weight": numbers(V, WIDTH), "lm_head.weight": np.zeros((V, WIDTH), np.uint8)}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UsageError, match=r"its head is U8\[64, 8\] where BF16 or F16 or F32 and \[64, 8\] were"):
        trim(source, KEPT, tmp_path / "out")


def damage(path: Path, way: str) -> str:
    """Damage a checkpoint in the way that is named, and return the message that must follow."""
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if way == "truncated":
        weights.write_bytes(content[:-5])
    elif way == "header":
        weights.write_bytes(content[:20])
        return "it lacks the expected JSON object"
    elif way == "huge header":
        weights.write_bytes((1 << 60).to_bytes(8, "little") + content[8:])
        return "its header cannot be read"
    elif way == "empty":
        weights.write_bytes(b"")
        return "its header cannot be read"
    elif way == "negative":
        text = content[8 : 8 + length].replace(b'"data_offsets":[0,', b'"data_offsets":[-1,', 1)
        weights.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    elif way == "fewer bytes":
        text = content[8 : 8 + length].replace(b'"dtype":"F32","shape":[64,8]', b'"dtype":"F16","shape":[64,8]')
        weights.write_bytes(content[:8] + text + content[8 + length :])
        return r"its head is F16\[64, 8\]"
    elif way == "bin":
        weights.rename(path / "pytorch_model.bin")
        return r"holds no model\.safetensors; name a checkpoint in that format"
    elif way == "index":
        weights.rename(path / "other.safetensors")
        (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
        return "is not the name of a file beside it"
    elif way == "lost":
        weights.rename(path / "other.safetensors")
        (path / "model.safetensors.index.json").write_text('{"weight_map": {"lost": "other.safetensors"}}')
        return "lost is not in the file"
    elif way == "config":
        (path / "config.json").write_text("[1]")
        return "no JSON object"
    elif way == "sizes":
        (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "vocab_size": 0, "hidden_size": 8}')
        return "names no vocab_size"
    elif way == "tokenizer":
        (path / "tokenizer.json").unlink()
        return r"tokenizer\.json cannot be read"
    return "damaged or truncated at"


@pytest.mark.parametrize(
    "way",
    [
        *("truncated", "header", "huge header", "empty", "negative", "fewer bytes", "bin", "index", "lost"),
        *("config", "sizes", "tokenizer"),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path: Path, way: str) -> None:
    source = llama(tmp_path / "m")
    message = damage(source, way)
    with pytest.raises(UsageError, match=message) as caught:
        trim(source, KEPT, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"model": []}',
        '{"model": {"vocab": [[]]}}',
        '{"model": {"vocab": {"a": "0"}}}',
        '{"model": {"vocab": {"a": -1}}}',
        '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}',
        "not JSON",
    ],
)
def test_damaged_vocabularies_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    source = llama(tmp_path / "m")
    (source / "tokenizer.json").write_text(text)
    with pytest.raises(UsageError, match=r"tokenizer\.json: ") as caught:
        vocabulary(source)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit in a separate process, below the size of the weights, stands for a full disk."""
    source = llama(tmp_path / "m")
    program = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from specplug.core import int_array\nfrom specplug.errors import SpecplugError\n"
        "from specplug.transforms.checkpoint_head import trim\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        f"try: trim(Path({str(source)!r}), int_array({KEPT.tolist()}), Path({str(tmp_path / 'out')!r}))\n"
        "except SpecplugError as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"SpecplugError {tmp_path / 'out'}: cannot be written (File too large)"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_changed_file_is_detected(tmp_path: Path) -> None:
    trim(llama(tmp_path / "m"), KEPT, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.safetensors: its SHA-256 is [0-9a-f]{12}, the manifest says"):
        drafter_folders.read(tmp_path / "out")


def test_a_folder_in_use_is_refused_and_unchanged(tmp_path: Path) -> None:
    source = llama(tmp_path / "m")
    before = sorted(source.iterdir())
    with pytest.raises(UsageError, match="exists already"):
        trim(source, KEPT, source)
    assert sorted(source.iterdir()) == before
