"""The models on this disk: the stores, the facts that files tell, and the command that lists both.

Expected values come from the formats: gguf's enumerations, the keys that llama.cpp reads per architecture, published
config.json files, and the layouts of the stores.
"""

import json
import os
import shlex
import struct
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from specplug.models import packaged_models, references
from specplug.models.model_facts import FILE_TYPES, TENSOR_TYPES, ModelFacts, model_facts, pairs
from specplug.models.model_stores import StoredModel, stored_models
from specplug_cli.completion import model_references
from specplug_cli.models import models

VARIABLES = ("LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "SPECPLUG_MODELS", "SPECPLUG_JSON")
TOKENS = ["<s>", "a", "b", "ab"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, no packaged models, and none of the variables that name stores."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "HOME": folder,
        "XDG_CACHE_HOME": folder / ".cache",
        "OLLAMA_MODELS": folder / "ollama",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(packaged_models, "NAMES", ())
    monkeypatch.setattr(sys, "platform", "linux")
    return folder


def write_gguf(
    path: Path,
    architecture: str = "llama",
    numbers: Mapping[str, int | list[int]] | None = None,
    *,
    tokens: list[str] = TOKENS,
    file_type: int | None = 7,
    causal: bool | None = None,
    rows: int = 1,
) -> Path:
    """A small GGUF file: metadata, two q8_0 matrices, one of f32 with `rows` rows of 32, and a vector."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    values = {"block_count": 2, "context_length": 4096, "attention.head_count": 4} | dict(numbers or {})
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    if file_type is not None:
        writer.add_file_type(file_type)
    if causal is not None:
        writer.add_causal_attention(causal)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
    for name in ("one", "two"):
        blocks = np.ones((2, 34), dtype=np.uint8)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("three", np.ones((rows, 32), dtype=np.float32))
    writer.add_tensor("vector", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_checkpoint(folder: Path, config: Mapping[str, Any] | None = None, *, num_bytes: int = 64) -> Path:
    """A checkpoint's folder with one tensor of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config if config is not None else {"model_type": "llama"}))
    header = json.dumps({"t": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))
    return folder


def found() -> list[tuple[str, str]]:
    return [(model.store, model.reference) for model in stored_models()]


# -- facts of GGUF files ---------------------------------------------------------------------------------------------


def test_the_names_of_formats_equal_those_of_the_reference_package() -> None:
    whole = {int(one): one.name.split("_", 1)[1] for one in gguf.LlamaFileType if one.name != "GUESSED"}
    assert {number: name for number, name in FILE_TYPES.items() if number in whole} == whole
    tensors = {int(one): one.name for one in gguf.GGMLQuantizationType}
    assert {number: name for number, name in TENSOR_TYPES.items() if number in tensors} == {
        number: name for number, name in tensors.items() if number in TENSOR_TYPES
    }


def test_the_facts_of_a_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "qwen2", {"context_length": 32768}, file_type=15)
    assert model_facts(path) == ModelFacts(
        bytes=path.stat().st_size,
        format="GGUF Q4_K_M",
        architecture="qwen2",
        context=32768,
        memory="attention",
        tokenizer=references.tokenizer_hash(path),
        num_tokens=len(TOKENS),
        problem=None,
        rollback="any tail",
    )


@pytest.mark.parametrize(("file_type", "name"), [(1, "GGUF F16"), (None, "GGUF Q8_0"), (999, "GGUF Q8_0")])
def test_without_a_known_file_type_the_format_is_that_of_most_matrices(
    tmp_path: Path, file_type: int | None, name: str
) -> None:
    """Two matrices of three are in q8_0; the vector does not count."""
    assert model_facts(write_gguf(tmp_path / "m.gguf", file_type=file_type)).format == name


def test_a_file_without_a_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    facts = model_facts(write_gguf(tmp_path / "m.gguf", tokens=[]))
    assert (facts.tokenizer, facts.num_tokens) == (None, None)


SSM = {"ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16}
MEMORY: dict[str, tuple[str, dict[str, int | list[int]], str]] = {
    "llama": ("llama", {"attention.head_count_kv": 2}, "attention"),
    "an unknown one": ("nextyear", {"some.new_key": 3}, "attention"),
    "gemma3": ("gemma3", {"attention.sliding_window": 512}, "sliding window"),
    "a window as long as the context": ("llama", {"attention.sliding_window": 4096}, "attention"),
    "no window": ("olmo2", {"attention.sliding_window": 0}, "attention"),
    "deci, whose layers without attention keep nothing": ("deci", {"attention.head_count_kv": [8, 0]}, "attention"),
    "mamba": ("mamba", SSM | {"attention.head_count": 0}, "recurrent"),
    "rwkv7": ("rwkv7", {"attention.head_count": 0, "wkv.head_size": 64}, "recurrent"),
    "jamba": ("jamba", SSM | {"attention.head_count_kv": [0, 8]}, "hybrid"),
    "falcon-h1": ("falcon-h1", SSM | {"attention.head_count_kv": 2}, "hybrid"),
    "lfm2": ("lfm2", {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 8]}, "hybrid"),
    "qwen35": ("qwen35", SSM | {"full_attention_interval": 4}, "hybrid"),
    "kimi-linear": ("kimi-linear", {"kda.head_dim": 128, "attention.head_count_kv": [0, 1]}, "hybrid"),
    "minimax-01": ("minimax-01", {"attention.recurrent_layers": [1, 0]}, "hybrid"),
    "deepseek4": ("deepseek4", {"attention.compress_ratios": [4, 128], "attention.sliding_window": 128}, "hybrid"),
}
"""Architecture, the keys that llama.cpp reads for it, and its memory there: llm_arch_is_recurrent and _is_hybrid."""


@pytest.mark.parametrize("name", MEMORY)
def test_the_memory_follows_from_the_keys_of_the_layers(tmp_path: Path, name: str) -> None:
    architecture, numbers, memory = MEMORY[name]
    facts = model_facts(write_gguf(tmp_path / "m.gguf", architecture, numbers))
    assert facts.memory == memory
    assert facts.problem is None
    snapshots = architecture in ("lfm2", "qwen35", "deepseek4")
    by_state = "snapshots" if snapshots else "second pass"
    assert facts.rollback == (by_state if memory in ("recurrent", "hybrid") else "any tail")


def test_models_that_generate_no_text_of_their_own_cannot_run(tmp_path: Path) -> None:
    def problem(*arguments: Any, **options: Any) -> str:
        return str(model_facts(write_gguf(tmp_path / "m.gguf", *arguments, **options)).problem)

    assert problem("bert", causal=False).startswith("bert is an embedding model, which generates no text")
    assert problem("qwen3", {"pooling_type": 3}).startswith("qwen3 with pooling is an embedding model")
    assert problem("eagle3").startswith("eagle3 drafts with the hidden states of another model")
    assert problem("clip", {"block_count": 0}).startswith("clip without layers is no language model")


def test_damaged_files_have_a_problem_without_their_path(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", rows=100)
    os.truncate(path, path.stat().st_size - 1000)
    facts = model_facts(path)
    assert str(facts.problem).startswith("truncated: ") and facts.architecture == "llama"
    path.write_bytes(b"GGUF\3\0\0\0")
    facts = model_facts(path)
    assert facts == ModelFacts(8, "GGUF", problem=facts.problem) and "its header ends too early" in str(facts.problem)
    path.write_text("text")
    assert str(model_facts(path).problem).startswith("not a GGUF file")
    assert model_facts(tmp_path / "nowhere.gguf").problem is not None


def test_a_model_in_parts_has_the_bytes_of_all(tmp_path: Path) -> None:
    parts = [write_gguf(tmp_path / f"m-0000{number}-of-00002.gguf", rows=number) for number in (1, 2)]
    facts = model_facts(parts[0])
    assert facts.bytes == sum(part.stat().st_size for part in parts) and facts.problem is None


# -- facts of checkpoints --------------------------------------------------------------------------------------------


def test_the_facts_of_a_checkpoint(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "num_attention_heads": 9,
    }
    folder = write_checkpoint(tmp_path / "m", config)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    assert model_facts(folder) == ModelFacts(
        bytes=(folder / "model.safetensors").stat().st_size,
        format="safetensors bfloat16",
        architecture="llama",
        context=8192,
        memory="attention",
        tokenizer=sha256(b"{}").hexdigest(),
        num_tokens=49152,
        problem=None,
    )


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"dtype": "float16"}, "safetensors float16"),
        ({"text_config": {"torch_dtype": "torch.bfloat16"}}, "safetensors bfloat16"),
        ({"dtype": "bfloat16", "quantization_config": {"quant_method": "awq"}}, "safetensors awq"),
        ({}, "safetensors"),
    ],
)
def test_the_format_of_a_checkpoint_is_its_quantisation_or_number_format(
    tmp_path: Path, config: dict[str, Any], name: str
) -> None:
    assert model_facts(write_checkpoint(tmp_path, config)).format == name


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2.5": (
        {"sliding_window": 32768, "use_sliding_window": False, "max_position_embeddings": 131072},
        "attention",
    ),
    "Mistral 7B v0.1": ({"sliding_window": 4096, "max_position_embeddings": 32768}, "sliding window"),
    "Gemma 3": ({"text_config": {"layer_types": ["sliding_attention", "full_attention"]}}, "sliding window"),
    "Qwen3-Next": ({"layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 16}, "hybrid"),
    "LFM2": ({"layer_types": ["conv", "full_attention"]}, "hybrid"),
    "Granite 4 without Mamba": ({"layer_types": ["attention"], "mamba_d_state": 128}, "attention"),
    "Nemotron-H": ({"hybrid_override_pattern": "M-M*-"}, "hybrid"),
    "RecurrentGemma": ({"block_types": ["recurrent", "recurrent", "attention"]}, "hybrid"),
    "Falcon-H1": ({"mamba_d_ssm": 1536, "num_attention_heads": 8}, "hybrid"),
    "Kimi Linear": ({"linear_attn_config": {"head_dim": 128}, "num_attention_heads": 32}, "hybrid"),
    "Mamba": ({"state_size": 16, "conv_kernel": 4, "time_step_rank": 48}, "recurrent"),
    "RWKV": ({"attention_hidden_size": 768, "rescale_every": 6}, "recurrent"),
    "nothing": ({}, "attention"),
}
"""The telling keys of published config.json files."""


@pytest.mark.parametrize("name", CONFIGS)
def test_the_memory_of_a_checkpoint_follows_from_its_config(tmp_path: Path, name: str) -> None:
    config, memory = CONFIGS[name]
    assert model_facts(write_checkpoint(tmp_path, config)).memory == memory


def test_incomplete_checkpoints_have_a_problem(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert "are missing: model-2.safetensors; download it again" in str(model_facts(folder).problem)
    index.write_text('{"weight_map"')
    assert "model.safetensors.index.json is damaged" in str(model_facts(folder).problem)
    index.unlink()
    assert model_facts(folder).problem is None
    weights = folder / "model.safetensors"
    for length in (weights.stat().st_size - 1, 20, 3, 0):
        os.truncate(weights, length)
        assert "model.safetensors is damaged or half written" in str(model_facts(folder).problem)
    (folder / "config.json").write_text("[1]")
    assert "its config.json is damaged" in str(model_facts(folder).problem)


def test_checkpoints_that_generate_no_text_cannot_run(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bert", {"architectures": ["BertModel"]})
    assert model_facts(folder).problem == "BertModel generates no text; name a language model"
    for name in ("Qwen2ForCausalLM", "Gemma3ForConditionalGeneration", "GPT2LMHeadModel", "InternVLChatModel"):
        assert model_facts(write_checkpoint(tmp_path / name, {"architectures": [name]})).problem is None
    (folder / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    (folder / "modules.json").write_text("[]")
    assert "an embedding model" in str(model_facts(folder).problem)


# -- pairs -----------------------------------------------------------------------------------------------------------


def facts(num_bytes: int, format: str = "GGUF Q8_0", tokenizer: str | None = "t", problem: str | None = None) -> Any:
    return ModelFacts(num_bytes, format, tokenizer=tokenizer, problem=problem)


def test_a_model_drafts_for_those_of_its_tokenizer_that_are_three_times_as_large() -> None:
    listed = {
        "small": facts(100),
        "just too small": facts(299),
        "large": facts(300, "GGUF Q4_K_M"),
        "folder": facts(900, "safetensors bfloat16"),
        "other": facts(900, tokenizer="u"),
        "unknown": facts(900, tokenizer=None),
        "unknown, too": facts(100, tokenizer=None),
        "broken": facts(900, problem="half written"),
        "largest": facts(900),
    }
    assert pairs(listed) == [
        ("small", "large"),
        ("small", "largest"),
        ("just too small", "largest"),
        ("large", "largest"),
    ]


# -- stores ----------------------------------------------------------------------------------------------------------


def ollama_model(home: Path, name: str, content: bytes) -> Path:
    """Put a model into Ollama's store; returns its blob."""
    digest = sha256(content).hexdigest()
    blob = home / "ollama" / "blobs" / f"sha256-{digest}"
    manifest = home / "ollama" / "manifests" / "registry.ollama.ai" / "library" / name / "latest"
    for path in (blob, manifest):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": len(content)}
    manifest.write_text(json.dumps({"layers": [layer]}))
    return blob


def hub_model(home: Path, name: str, content: bytes) -> Path:
    """Put a file of the repository org/repo into the hub's cache; returns its blob."""
    storage = home / ".cache" / "huggingface" / "hub" / "models--org--repo"
    blob = storage / "blobs" / sha256(content).hexdigest()
    link = storage / "snapshots" / COMMIT / name
    for path in (blob, link, storage / "refs" / "main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(os.path.relpath(blob, link.parent))
    (storage / "refs" / "main").write_text(COMMIT)
    return blob


def test_all_stores_are_searched_and_every_usable_reference_resolves(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content(number: int) -> bytes:
        return write_gguf(tmp_path / "any.gguf", rows=number).read_bytes()

    hub_model(home, "repo-Q8_0.gguf", content(1))
    ollama_model(home, "some", content(2))
    cached = write_gguf(home / ".cache" / "llama.cpp" / "org_repo_m-Q8_0.gguf", rows=3)
    studio = write_gguf(home / ".lmstudio" / "models" / "publisher" / "repo" / "m.gguf", rows=4)
    own = write_gguf(tmp_path / "own" / "m.gguf", rows=5)
    checkpoint = write_checkpoint(tmp_path / "more" / "checkpoint")
    monkeypatch.setenv("SPECPLUG_MODELS", os.pathsep.join([str(tmp_path / "own"), "", str(tmp_path / "more")]))
    assert found() == [
        ("hub", "hf:org/repo:Q8_0"),
        ("ollama", "ollama:some"),
        ("llama.cpp", str(cached)),
        ("LM Studio", str(studio)),
        *sorted([("folder", str(checkpoint)), ("folder", str(own))]),
    ]
    for model in stored_models():
        assert model.path is not None and model.problem is None
        assert os.path.samefile(references.resolve(model.reference), model.path)


def test_a_file_in_several_stores_is_listed_once_under_its_shortest_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_gguf(tmp_path / "any.gguf").read_bytes()
    blob = ollama_model(home, "same", content)
    own = tmp_path / "own"
    own.mkdir()
    (own / "link.gguf").symlink_to(blob)
    monkeypatch.setenv("SPECPLUG_MODELS", str(own))
    assert found() == [("ollama", "ollama:same")]
    hub_blob = hub_model(home, "repo-Q8_0.gguf", content)
    blob.unlink()
    blob.symlink_to(hub_blob)
    assert found() == [("hub", "hf:org/repo:Q8_0")]


def test_a_model_that_cannot_be_used_does_not_hide_the_one_with_the_same_file(home: Path) -> None:
    blob = ollama_model(home, "base", b"GGUF")
    ollama_model(home, "adapted", b"GGUF")
    manifest = home / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "adapted" / "latest"
    layers = json.loads(manifest.read_text())["layers"]
    manifest.write_text(json.dumps({"layers": [*layers, {"mediaType": "application/vnd.ollama.image.adapter"}]}))
    assert found() == [("ollama", "ollama:adapted"), ("ollama", "ollama:base")]
    assert stored_models()[1] == StoredModel("ollama", "ollama:base", blob)


def test_the_cache_of_llama_cpp_may_have_the_layout_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "models--org--repo" / "snapshots" / COMMIT / "Q8_0" / "m.gguf"
    assert found() == []
    write_gguf(path)
    assert found() == [("llama.cpp", str(path))]


@pytest.mark.parametrize("place", ["pointer", "settings", "older"])
def test_lm_studio_may_keep_its_models_elsewhere(home: Path, tmp_path: Path, place: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    path = elsewhere / "models" / "publisher" / "repo" / "m.gguf"
    if place == "pointer":
        (home / ".lmstudio-home-pointer").write_text(f"{elsewhere}\n")
    elif place == "settings":
        (home / ".lmstudio").mkdir()
        (home / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": str(elsewhere)}))
    else:
        path = home / ".cache" / "lm-studio" / "models" / "publisher" / "repo" / "m.gguf"
    write_gguf(path)
    assert found() == [("LM Studio", str(path))]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"downloadsFolder": 5}'])
def test_settings_that_are_damaged_name_no_folder(home: Path, content: str) -> None:
    (home / ".lmstudio").mkdir()
    (home / ".lmstudio" / "settings.json").write_text(content)
    (home / ".lmstudio-home-pointer").write_bytes(b"\xff\0")
    assert found() == []


# -- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("SPECPLUG_MODELS", str(folder))
    return folder


def problems() -> dict[str, str | None]:
    """The problem of each listed model by the name of its file."""
    return {Path(model.reference).name: model.problem for model in stored_models()}


def test_links_do_not_lead_in_circles(own: Path) -> None:
    write_gguf(own / "a" / "m.gguf")
    (own / "a" / "up").symlink_to(own)
    (own / "b").symlink_to(own / "a")
    (own / "self").symlink_to(own / "self")
    assert problems() == {"m.gguf": None}


def test_folders_are_searched_to_a_depth_and_hidden_ones_are_not(own: Path) -> None:
    write_gguf(own / "1" / "2" / "3" / "4" / "deep.gguf")
    write_gguf(own / "1" / "2" / "3" / "4" / "5" / "deeper.gguf")
    write_gguf(own / ".cache" / "hidden.gguf")
    assert problems() == {"deep.gguf": None}


def test_a_folder_that_cannot_be_read_is_left_out(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(own / "m.gguf")
    write_gguf(own / "closed" / "m2.gguf")
    listdir = os.listdir

    def refusing(path: Any) -> list[str]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    assert problems() == {"m.gguf": None}
    monkeypatch.setenv("SPECPLUG_MODELS", os.pathsep.join(["~nobody-here/x", "/dev/null/x", "missing"]))
    assert problems() == {}


def test_a_model_in_parts_is_listed_once_and_missing_parts_are_named(own: Path) -> None:
    for number in (1, 2):
        write_gguf(own / f"whole-0000{number}-of-00002.gguf", rows=number)
    write_gguf(own / "half-00002-of-00003.gguf", rows=3)
    write_gguf(own / "odd-00000-of-00000.gguf", rows=4)
    (own / "half-00003-of-00003.gguf.downloadInProgress").write_bytes(b"GGUF")
    assert problems() == {
        "half-00001-of-00003.gguf": "2 of its 3 parts are missing: half-00001-of-00003.gguf, half-00003-of-00003.gguf; "
        "copy or download them",
        "odd-00000-of-00000.gguf": None,
        "whole-00001-of-00002.gguf": None,
    }


def test_unfinished_downloads_and_broken_links_have_a_problem(own: Path) -> None:
    (own / "a.gguf.downloadInProgress").write_bytes(b"GGUF")
    (own / "b.gguf.part").write_bytes(b"GGUF")
    write_gguf(own / "b.gguf")
    (own / "c.gguf").symlink_to(own / "gone.gguf")
    (own / "d.txt.part").write_text("")
    if hasattr(os, "mkfifo"):
        os.mkfifo(own / "pipe.gguf")  # to open it would wait for a writer
    listed = problems()
    assert listed.keys() == {"a.gguf", "b.gguf", "c.gguf"} and listed["b.gguf"] is None
    assert "its download has not finished" in str(listed["a.gguf"])
    assert "a link to a file that does not exist" in str(listed["c.gguf"])


def test_projectors_and_drafting_heads_are_listed_beside_their_model(own: Path) -> None:
    model = write_gguf(own / "model-Q8_0.gguf")
    beside = ["dflash-model.gguf", "eagle3-model.gguf", "mmproj-model-f16.gguf", "model.mmproj-Q8_0.gguf", "mtp-m.gguf"]
    for name in (*beside, "imatrix.gguf", "model.imatrix.gguf"):
        write_gguf(own / name, rows=2)
    assert stored_models() == [StoredModel("folder", str(model), model, None, tuple(own / name for name in beside))]


def test_a_folder_with_a_config_alone_is_no_model(own: Path) -> None:
    (own / "a").mkdir()
    (own / "a" / "config.json").write_text("{}")
    assert problems() == {}
    write_checkpoint(own / "a")
    assert problems() == {"a": None}


# -- packaged models -------------------------------------------------------------------------------------------------


def test_packaged_models_are_found_without_assembling_any(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, model = "demo:qwen-coder-small", packaged_models.SPLIT_MODELS["demo:qwen-coder-small"]
    monkeypatch.setattr(packaged_models, "NAMES", (ref, packaged_models.GEMMA))
    monkeypatch.setattr(
        packaged_models, "to_install", lambda name: None if name == ref else packaged_models.GEMMA_PACKAGES
    )
    assert stored_models() == [StoredModel("packaged", ref, None)]
    path = home / ".cache" / "specplug" / "models" / model.file
    path.parent.mkdir(parents=True)
    path.touch()
    assert stored_models() == [StoredModel("packaged", ref, None)], "a file of another size is not the model"
    os.truncate(path, model.num_bytes)
    assert stored_models() == [StoredModel("packaged", ref, path)]


# -- the command -----------------------------------------------------------------------------------------------------


def listing(*arguments: str) -> list[str]:
    done = CliRunner().invoke(models, [*arguments])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def test_the_table_names_models_so_that_they_can_be_pasted(own: Path) -> None:
    large = write_gguf(own / "a folder" / "large model.gguf", rows=200)
    small = write_gguf(own / ("long" * 40) / "small.gguf", "gemma3", {"attention.sliding_window": 512})
    broken = write_gguf(own / "hybrid.gguf", "lfm2", {"shortconv.l_cache": 3}, rows=2)
    write_gguf(small.parent / "mmproj-small.gguf", rows=3)
    done = CliRunner().invoke(models)
    lines = done.stdout.splitlines()
    rows = {shlex.split(line)[0]: line for line in lines[1:4]}
    assert rows.keys() == {str(large), str(small), str(broken)}
    assert "0 MB  GGUF Q8_0  llama" in rows[str(large)] and rows[str(large)].rstrip().endswith(
        "drafted for by small.gguf"
    )
    assert "gemma3" in rows[str(small)] and "4096  sliding window  drafts for large model.gguf" in rows[str(small)]
    assert "hybrid" in rows[str(broken)] and rows[str(broken)].rstrip().endswith("-")
    assert lines[4] == f"beside {small}: mmproj-small.gguf"
    assert lines[5] == f"{broken} keeps a state, of which llama.cpp saves snapshots: drafts are chains"
    plain, drafted = done.stderr.splitlines()
    assert plain == f'specplug: to use one: specplug run --model {shlex.quote(str(large))} "Why is the sky blue?"'
    assert f"--model {shlex.quote(str(large))} --draft {small} " in drafted


def test_the_json_has_all_fields_and_lists_that_are_not_shortened(own: Path) -> None:
    drafters = [write_gguf(own / f"small{number}.gguf", rows=number) for number in (1, 2)]
    large = write_gguf(own / "large.gguf", rows=200)
    (own / "none.gguf").symlink_to(own / "gone")
    assert "drafted for by 2 models" in listing()[1]
    document = json.loads("\n".join(listing("--json")))
    assert document["schema"] == 1
    by_name = {Path(model["reference"]).name: model for model in document["models"]}
    assert by_name["large.gguf"] == {
        "reference": str(large),
        "store": "folder",
        "path": str(large),
        "bytes": large.stat().st_size,
        "format": "GGUF Q8_0",
        "architecture": "llama",
        "context": 4096,
        "memory": "attention",
        "tokenizer": references.tokenizer_hash(large),
        "num_tokens": len(TOKENS),
        "drafts_for": [],
        "drafted_by": [str(path) for path in drafters],
        "sidecars": [],
        "problem": None,
        "rollback": "any tail",
        "heads": None,
    }
    assert by_name["small1.gguf"]["drafts_for"] == [str(large)]
    assert by_name["none.gguf"].keys() == by_name["large.gguf"].keys()
    assert by_name["none.gguf"]["problem"] and by_name["none.gguf"]["bytes"] is None


def test_the_listing_is_limited_to_a_part_of_the_name_or_of_the_architecture(own: Path) -> None:
    write_gguf(own / "one.gguf", "qwen2")
    write_gguf(own / "two.gguf", "llama", rows=2)
    assert [Path(line.split()[0]).name for line in listing("QWEN")[1:]] == ["one.gguf"]
    assert [Path(line.split()[0]).name for line in listing("two.g")[1:]] == ["two.gguf"]
    assert listing("three") == ["none of the 2 models on this disk has 'three' in its name or architecture"]
    assert json.loads("\n".join(listing("three", "--json"))) == {"schema": 1, "models": []}


def test_without_models_one_line_says_where_it_looked(home: Path, own: Path) -> None:
    (line,) = listing()
    places = [home / ".cache" / "huggingface" / "hub", home / "ollama", home / ".lmstudio" / "models", own]
    assert all(str(place) in line for place in places)
    assert "specplug run --model hf:ORG/REPO:Q4_K_M" in line and "specplug[hub]" in line


def test_names_from_files_cannot_change_the_terminal(own: Path) -> None:
    write_gguf(own / "bad\x1b[2J\n.gguf", "ar\x1bch")
    output = CliRunner().invoke(models).output
    assert "\x1b" not in output and "bad?[2J?.gguf" in output and "ar?ch" in output


def test_references_to_stores_are_completed(home: Path) -> None:
    def completed(incomplete: str) -> list[str]:
        argument = click.Argument(["model"])
        return [item.value for item in model_references(click.Context(models), argument, incomplete)]

    assert completed("ollama:") == completed("hf:") == []
    ollama_model(home, "llama3.2", b"one")
    ollama_model(home, "broken", b"two").unlink()
    hub_model(home, "repo-Q8_0.gguf", b"three")
    assert completed("ollama:") == completed("ollama:lla") == ["ollama:llama3.2"]
    assert completed("hf:org/") == ["hf:org/repo:Q8_0"] and completed("hf:other") == []


def test_on_a_narrow_terminal_names_are_not_cut(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(own / f"{'long' * 30}.gguf")
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which rich takes stdout for a terminal
    monkeypatch.setenv("COLUMNS", "40")
    lines = listing()
    assert any(line.split()[:1] == [str(path)] for line in lines) and "…" not in "".join(lines)


def test_without_a_home_folder_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in ("XDG_CACHE_HOME", "OLLAMA_MODELS", "HOME"):
        monkeypatch.delenv(name, raising=False)
    (line,) = listing()
    assert line.startswith("no models in ")
