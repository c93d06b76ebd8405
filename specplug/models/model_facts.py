"""What is known of a model from its files alone: size, weight format, architecture, context, memory and tokenizer.

Reads the header of a GGUF file, or the JSON files of a checkpoint's folder and the headers of its weights. No engine is
needed, and no weight is read.
Source of the kinds of memory: the files in src/models and src/llama-arch.cpp of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specplug.errors import UsageError
from specplug.models.gguf_header import Header, parts_of, read_header
from specplug.models.hub_reference import weight_files
from specplug.models.references import check_gguf, tokenizer_hash

LEAST_RATIO = 3
"""How many times as many bytes as its drafter a target has at least: a plain pass on a CPU takes about as long as
reading the weights, so that a draft token then costs a third of a plain token at most. Chosen."""

FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip
"""Names of weight formats by `general.file_type` (llama_ftype)."""

TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
    42: "Q2_0",
}  # fmt: skip
"""Names of ggml's types of weights, for files that do not name their format."""

STATE_KEYS = ("ssm.", "wkv.", "shortconv.", "kda.", "full_attention_interval", "attention.recurrent_layers",
              "attention.compress_ratios")  # fmt: skip
"""What the metadata keys of layers that keep a state begin with. Layers without KV heads alone are no sign: DeciLM has
layers without attention that keep nothing."""

STATE_LAYERS = re.compile("linear|mamba|conv|recurrent")
"""What the types of layers that keep a state contain in a config.json."""

STATE_SETTINGS = ("mamba_", "ssm_", "linear_attn_config", "linear_num_value_heads", "state_size", "conv_L_cache",
                  "lru_width", "rescale_every")  # fmt: skip
"""What the keys of a config.json with such layers begin with, where it does not list the types of layers."""

SNAPSHOT_ARCHITECTURES = frozenset(
    ("lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "qwen35", "qwen35moe", "qwen4exp", "kimi-k3", "deepseek4",
     "glm5-next", "bailingmoe3")
)  # fmt: skip
"""Architectures of which llama.cpp keeps the states before the last rows (llm_arch_supports_rs_rollback)."""

SEVERAL_MTP_LAYERS = ("hy_v3", "step35", "mimo2")
"""Architectures, by `general.architecture`, of which llama.cpp can run each of several MTP layers. It ends the process
where a file of another one has more than one."""

MTP_ARCHITECTURES = ("qwen35", "qwen35moe", "qwen3next", "glm4moe", "deepseek2", "cohere2moe", "nemotron_h_moe",
                     *SEVERAL_MTP_LAYERS)  # fmt: skip
"""Architectures with MTP layers, in which this was run (tests/test_mtp_layers.py)."""

MTP_STATES_WITH_LOGITS = ("qwen3next", "step35", "mimo2")
"""Those whose MTP layers have states for the rows with logits only. llama.cpp ends the process where those of all rows
are asked for; elsewhere it gives those of the first rows where only those with logits are."""

STATEFUL = ("recurrent", "hybrid")
"""The kinds of memory that keep a state, which nothing can be cut from."""

NO_TEXT = re.compile(r"(MaskedLM|Classification|QuestionAnswering|RewardModel|(Bert|BERT|Roberta|MPNet|Encoder)Model)$")
"""How the names of classes end that generate no text."""

EMBEDDING_FILE = "modules.json"
"""The file by which sentence-transformers opens a model, and turns its hidden states into an embedding."""

HEADER_LIMIT = 1 << 26
"""Bytes of a JSON document at most: a config.json, an index, or the header of a file in safetensors."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's files tell; None where they do not.

    bytes       of all files with weights
    format      of the weights, for people: `GGUF Q4_K_M`, `safetensors bfloat16`
    context     tokens that it was trained on
    memory      attention: keys and values of all tokens; sliding window: in some layers only those of recent tokens;
                recurrent: a state of fixed size; hybrid: a state in some layers
    tokenizer   `references.tokenizer_hash`
    num_tokens  size of the vocabulary
    problem     why it cannot run, with advice; None where it can
    rollback    how llama.cpp's engine takes rejected draft tokens back: any tail; snapshots of a state; or a second
                pass over the tokens that were right
    heads       layers of the file that draft for it: mtp
    """

    bytes: int
    format: str
    architecture: str | None = None
    context: int | None = None
    memory: str | None = None
    tokenizer: str | None = None
    num_tokens: int | None = None
    problem: str | None = None
    rollback: str | None = None
    heads: tuple[str, ...] = ()


def model_facts(path: Path) -> ModelFacts:
    """The facts of a GGUF file, by its first part where it has several, or of a checkpoint's folder."""
    return _checkpoint_facts(path) if path.is_dir() else _gguf_facts(path)


def pairs(models: Mapping[str, ModelFacts]) -> list[tuple[str, str]]:
    """Which model can draft for which other one, by reference: (drafter, target), in the order of the targets.

    Both can run on the same engine and have the same tokenizer, and the target is LEAST_RATIO times as large or more.
    """
    return [
        (drafter, target)
        for target, large in models.items()
        for drafter, small in models.items()
        if large.problem is None
        and small.problem is None
        and small.memory not in STATEFUL
        and small.tokenizer is not None
        and small.tokenizer == large.tokenizer
        and small.format.split()[0] == large.format.split()[0]
        and LEAST_RATIO * small.bytes <= large.bytes
    ]


def json_object(path: Path) -> dict[str, Any] | None:
    """The object that a file holds in JSON; None where it holds none."""
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(HEADER_LIMIT))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _gguf_facts(path: Path) -> ModelFacts:
    num_bytes = sum(_size(part) for part in parts_of(path))
    problem = None
    try:
        header = check_gguf(path)
    except (UsageError, OSError) as error:
        problem = str(error).removeprefix(f"{path}: ")
        try:
            header = read_header(path)
        except UsageError:
            return ModelFacts(num_bytes, "GGUF", problem=problem)
    name = FILE_TYPES.get(-1 if header.file_type is None else header.file_type)
    if name is None and header.most_used is not None:
        name = TENSOR_TYPES.get(header.most_used)
    memory = memory_kind(header.numbers)
    rollback = "any tail"
    if memory in STATEFUL:
        rollback = "snapshots" if header.architecture in SNAPSHOT_ARCHITECTURES else "second pass"
    return ModelFacts(
        bytes=num_bytes,
        format=f"GGUF {name}" if name else "GGUF",
        architecture=header.architecture,
        context=_largest(header.numbers.get("context_length")) or None,
        memory=memory,
        tokenizer=header.tokenizer if header.num_tokens else None,
        num_tokens=header.num_tokens or None,
        problem=problem,
        rollback=rollback,
        heads=("mtp",) if has_mtp_layer(header) else (),
    )


def has_mtp_layer(header: Header) -> bool:
    """Whether a model brings an MTP layer that llama.cpp's engine can draft with."""
    count = _largest(header.numbers.get("nextn_predict_layers"))
    return header.architecture in (MTP_ARCHITECTURES if count == 1 else SEVERAL_MTP_LAYERS if count else ())


def memory_kind(numbers: Mapping[str, int | tuple[int, ...]]) -> str:
    """The memory of a GGUF file, as in ModelFacts.

    By the keys that describe layers, so that an architecture that is not known here is attention.
    """
    heads = _largest(numbers.get("attention.head_count"))
    if any(key.startswith(STATE_KEYS) and _largest(value) for key, value in numbers.items()):
        return "hybrid" if heads and _largest(numbers.get("attention.head_count_kv", 1)) else "recurrent"
    window, context = (_largest(numbers.get(key)) for key in ("attention.sliding_window", "context_length"))
    return _attention(window, context)


def _attention(window: int, context: int) -> str:
    """A window as long as the whole context hides nothing."""
    return "sliding window" if window > 0 and (window < context or not context) else "attention"


def _checkpoint_facts(folder: Path) -> ModelFacts:
    weights = _weight_files(folder)
    num_bytes = sum(_size(file) for file in weights)
    config = json_object(folder / "config.json")
    if config is None:
        return ModelFacts(num_bytes, "safetensors", problem="its config.json is damaged; download it again")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else {}
    settings = config | text
    quantization = settings.get("quantization_config")
    dtype = quantization.get("quant_method") if isinstance(quantization, dict) else None
    dtype = dtype or settings.get("dtype") or settings.get("torch_dtype") or ""
    tokenizer = None
    with suppress(UsageError):
        tokenizer = tokenizer_hash(folder)
    return ModelFacts(
        bytes=num_bytes,
        format=f"safetensors {str(dtype).removeprefix('torch.')}".rstrip(),
        architecture=str(config["model_type"]) if "model_type" in config else None,
        context=_number(settings.get("max_position_embeddings")) or None,
        memory=_checkpoint_memory(settings),
        tokenizer=tokenizer,
        num_tokens=_number(settings.get("vocab_size")) or None,
        problem=_weight_problem(folder, weights) or _class_problem(folder, config),
    )


def _checkpoint_memory(settings: Mapping[str, Any]) -> str:
    """By the types of the layers where they are listed, else by the keys that only such layers need."""
    listed = settings.get("layer_types") or settings.get("layers_block_type") or settings.get("block_types")
    if not listed and isinstance(settings.get("hybrid_override_pattern"), str):
        letters = {"M": "mamba", "*": "attention"}
        listed = [letters[letter] for letter in settings["hybrid_override_pattern"] if letter in letters]
    if isinstance(listed, list) and listed:
        states = [bool(STATE_LAYERS.search(str(kind))) for kind in listed]
        if any(states):
            return "recurrent" if all(states) else "hybrid"
        limited = any(re.search("sliding|chunked", str(kind)) for kind in listed)
        return "sliding window" if limited else "attention"
    if any(key.startswith(STATE_SETTINGS) for key in settings):
        return "hybrid" if _number(settings.get("num_attention_heads")) else "recurrent"
    window = 0 if settings.get("use_sliding_window") is False else _number(settings.get("sliding_window"))
    return _attention(window, _number(settings.get("max_position_embeddings")))


def _class_problem(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / EMBEDDING_FILE).is_file():
        return "an embedding model, which generates no text; name a language model"
    classes = config.get("architectures")
    if isinstance(classes, list) and classes and all(NO_TEXT.search(str(name)) for name in classes):
        return f"{', '.join(map(str, classes))} generates no text; name a language model"
    return None


def _weight_files(folder: Path) -> list[Path]:
    return [folder / name for name in weight_files(file.name for file in folder.glob("*.safetensors"))]


def _weight_problem(folder: Path, weights: list[Path]) -> str | None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json_object(index)
        names = content.get("weight_map") if content is not None else None
        if not isinstance(names, dict):
            return f"its {index.name} is damaged; download it again"
        missing = sorted({str(name) for name in names.values() if not (folder / str(name)).is_file()})
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
            return f"files that {index.name} names are missing: {shown}; download it again"
    for file in weights:
        if not _is_complete(file):
            return f"{file.name} is damaged or half written; download it again"
    return None


def _is_complete(file: Path) -> bool:
    """Whether a file in safetensors has all bytes that its header describes."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= HEADER_LIMIT:
                return False
            header = json.loads(stream.read(length))
        ends = [int(value["data_offsets"][1]) for key, value in header.items() if key != "__metadata__"]
    except (OSError, ValueError, AttributeError, TypeError, LookupError, RecursionError):
        return False
    return 8 + length + max(ends, default=0) <= _size(file)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _largest(value: int | tuple[int, ...] | None) -> int:
    return max(value, default=0) if isinstance(value, tuple) else value or 0


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
