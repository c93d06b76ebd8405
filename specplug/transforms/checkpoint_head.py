"""Trims the head of a Hugging Face checkpoint or an EAGLE-3 head to chosen rows. The result is a drafter for vLLM.

Source: VocabTrim (arXiv 2506.22694). The ids of the rows are stored as vLLM reads them from EAGLE-3 heads
(vllm/model_executor/models/llama_eagle3.py): `d2t`, int64[rows], the id of row j minus j; `t2d`, bool[V], whether an id
has a row. The input keeps the full vocabulary. Rows are copied as bytes, in every weight format, so that no engine is
loaded. The module does not depend on how the rows were chosen or on how the drafter is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from shutil import copyfile
from typing import Any, cast

import numpy as np

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.machine import fingerprint
from specplug.models import drafter_folders
from specplug.models.checkpoint_heads import EAGLE3
from specplug.models.drafter_folders import Manifest
from specplug.models.references import tokenizer_hash
from specplug.transforms import tensor_files
from specplug.transforms.dequantise import END_TOKENS
from specplug.transforms.gguf_head import check_ids, piece_bytes
from specplug.transforms.head_shape import HeadShape
from specplug.transforms.kept_ids import Vocabulary
from specplug.transforms.tensor_files import Entry, Tensor

TRIMMED = {
    "LlamaForCausalLM": "SpecplugTrimmedLlamaForCausalLM",
    "Qwen2ForCausalLM": "SpecplugTrimmedQwen2ForCausalLM",
    "Qwen3ForCausalLM": "SpecplugTrimmedQwen3ForCausalLM",
    "Gemma3ForCausalLM": "SpecplugTrimmedGemma3ForCausalLM",
}
"""The supported architectures, with the names of their trimmed versions, which specplug's vLLM plugin registers."""

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Tensor names. Without the second, or if the configuration says so, the embedding table is the head."""

ROW_IDS, HAS_ROW = "d2t", "t2d"
"""Tensor names: the ids of the head's rows, and which ids have a row."""

FLOATS = {"BF16": 2, "F16": 2, "F32": 4}
"""Weight formats whose rows can be copied alone, with bytes per weight; other formats have scales in other tensors."""

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Files of the tokenizer and the chat template, which are copied unchanged."""

JSON_LIMIT = 256 << 20
"""Bytes of a JSON file at most."""

MAX_TOKENS = 1 << 22
"""Tokens of a vocabulary at most; the largest ones have some hundred thousand."""

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
RESERVED = re.compile(r"<unused\d+>|<\|?reserved_(special_)?token_\d+\|?>")
"""The texts of byte fallback tokens, and of reserved tokens, which never occur and of which Gemma has thousands."""


def vocabulary(folder: Path) -> Vocabulary:
    """The text and the kind of every token of a checkpoint, from its tokenizer.json. UsageError for an unknown kind."""
    config = _config(folder)
    num_tokens, _ = _sizes(folder, config)
    path = folder / "tokenizer.json"
    data = _read_json(path)
    try:
        text_of, added, control = _texts(data)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise UsageError(f"{path}: has no vocabulary of a known kind; name another model") from None
    byte_level = '"ByteLevel"' in json.dumps([data.get("decoder"), data.get("pre_tokenizer")])
    special = control | {id for id, text in text_of.items() if text in END_TOKENS or BYTE.fullmatch(text)}
    special |= {id for id, text in text_of.items() if text == data["model"].get("unk_token")} | _named(config)
    special -= {id for id, text in text_of.items() if RESERVED.fullmatch(text)}
    pieces = [b""] * num_tokens
    for id, text in text_of.items():
        if id < num_tokens and id not in control:
            pieces[id] = text.encode() if id in added else piece_bytes(text, byte_level=byte_level)
    return Vocabulary(pieces, frozenset(id for id in special if id < num_tokens))


def ids_with_rows(folder: Path) -> IntArray:
    """int32[n], ascending: the ids that the head has rows for. EAGLE-3 heads may have fewer than the vocabulary."""
    config, tensors = _config(folder), tensor_files.tensors_of(folder)
    return np.sort(_row_ids(folder, _sizes(folder, config)[0], tensors, _is_eagle3(config, tensors)))


def head_shape(folder: Path, *, target: Path | None = None) -> HeadShape:
    """The sizes of the head and of the other weights. UsageError for an unknown architecture.

    target  the model that an EAGLE-3 head drafts for; needed where it uses that model's output head
    """
    model = _open(folder, target)
    beside = sum(
        tensor.num_bytes
        for name, tensor in model.tensors.items()
        if name not in (HEAD, ROW_IDS, HAS_ROW) and not name.endswith("embed_tokens.weight")
    )
    rows, width = model.head.shape
    return HeadShape(rows, width, model.tied, model.head.row_bytes, beside)


def trim(
    source: Path,
    ids: IntArray,
    out: Path,
    *,
    built: Mapping[str, Any] | None = None,
    target: Path | None = None,
) -> Manifest:
    """Write the folder `out`: the model with the rows `ids` in its head, all other weights unchanged, and the manifest.

    ids     int32[n], ascending; ids that an EAGLE-3 head has no rows for are left out
    built   facts about the build, for the manifest
    target  the model that an EAGLE-3 head drafts for, whose tokenizer it has, and whose output head where it has none
    UsageError for a damaged file, an unknown architecture or invalid ids; SpecplugError where writing fails.
    """
    model = _open(source, target)
    num_tokens = model.num_tokens
    check_ids(ids, num_tokens, source)
    kept = np.intersect1d(ids, model.row_ids).astype(np.int32)
    if not len(kept):
        raise UsageError(f"{source}: its head has none of the {len(ids)} tokens; choose ids that it has rows for")
    manifest = Manifest(
        format="checkpoint",
        kind="eagle3" if model.eagle3 else "model",
        architecture=model.architecture,
        tokenizer=tokenizer_hash(target if model.eagle3 and target is not None else source),
        num_tokens=num_tokens,
        rows=len(kept),
        source=fingerprint.model_identity(source),
        built=dict(built or {}),
    )
    with drafter_folders.writing(out) as partial:
        tensor_files.write(partial / tensor_files.WEIGHTS, _entries(model, kept))
        text = json.dumps(_trimmed_config(model, len(kept)), indent=2)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        for name in COPIED:
            if (source / name).is_file():
                copyfile(source / name, partial / name)
        return drafter_folders.finish(partial, manifest, kept)


@dataclass(frozen=True, slots=True)
class _Model:
    """A checkpoint whose head can be trimmed; `row_ids` holds the id of each row of `head`."""

    config: Mapping[str, Any]
    architecture: str
    eagle3: bool
    num_tokens: int
    tensors: Mapping[str, Tensor]
    head: Tensor
    tied: bool
    row_ids: IntArray


def _open(folder: Path, target: Path | None) -> _Model:
    config, tensors = _config(folder), tensor_files.tensors_of(folder)
    architecture = _architecture(config)
    eagle3 = _is_eagle3(config, tensors)
    if not eagle3 and architecture not in TRIMMED:
        known = ", ".join([*TRIMMED, *EAGLE3])
        raise UsageError(f"{folder}: the head of architecture {architecture} is not known; known: {known}")
    num_tokens, width = _sizes(folder, config)
    tied = not eagle3 and (bool(config.get("tie_word_embeddings")) or HEAD not in tensors)
    head = tensors.get(TABLE if tied else HEAD)
    if eagle3 and head is None and target is not None:
        head = _open(target, None).head
    if head is None:
        advice = "name the model that it drafts for" if eagle3 else "name a checkpoint whose head is not quantised"
        raise UsageError(f"{folder}: has no {TABLE if tied else HEAD}; {advice}")
    ids = _row_ids(folder, num_tokens, tensors, eagle3)
    if head.shape != (len(ids), width) or head.num_bytes != FLOATS.get(head.dtype, 0) * prod(head.shape):
        raise UsageError(
            f"{folder}: its head is {head.dtype}{list(head.shape)} where {' or '.join(FLOATS)} and "
            f"[{len(ids)}, {width}] were expected; name a checkpoint whose head is not quantised"
        )
    return _Model(config, architecture, eagle3, num_tokens, tensors, head, tied, ids)


def _row_ids(folder: Path, num_tokens: int, tensors: Mapping[str, Tensor], eagle3: bool) -> IntArray:
    if not eagle3 or ROW_IDS not in tensors:
        return np.arange(num_tokens, dtype=np.int32)
    offsets = tensor_files.read_array(tensors[ROW_IDS], ROW_IDS).ravel()
    ids = offsets + np.arange(len(offsets))
    if not len(ids) or ids.min() < 0 or ids.max() >= num_tokens or len(np.unique(ids)) < len(ids):
        raise UsageError(f"{folder}: its {ROW_IDS} does not hold distinct ids below {num_tokens}; download it again")
    return ids.astype(np.int32)


def _entries(model: _Model, kept: IntArray) -> dict[str, Entry]:
    entries = {
        name: tensor_files.copied(tensor)
        for name, tensor in model.tensors.items()
        if name not in (HEAD, ROW_IDS, HAS_ROW)
    }
    by_id = np.argsort(model.row_ids)
    row_of = by_id[np.searchsorted(model.row_ids, kept, sorter=by_id)]
    entries[HEAD] = tensor_files.rows(model.head, row_of.astype(np.int32))
    if model.eagle3 and len(kept) == model.num_tokens:
        return entries  # vLLM's EAGLE-3 head has no parameter for d2t where it has the full vocabulary
    entries[ROW_IDS] = tensor_files.array(kept.astype(np.int64) - np.arange(len(kept)))
    if model.eagle3:
        entries[HAS_ROW] = tensor_files.array(np.isin(np.arange(model.num_tokens), kept))
    return entries


def _trimmed_config(model: _Model, rows: int) -> dict[str, Any]:
    config = {**model.config, "draft_vocab_size": rows}
    if not model.eagle3:
        config |= {"architectures": [TRIMMED[model.architecture]], "tie_word_embeddings": False}
    return config


def _is_eagle3(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    if "speculators_model_type" in config:
        return bool(config["speculators_model_type"] == "eagle3")
    architecture = _architecture(config)
    return architecture in EAGLE3 or (architecture == "LlamaForCausalLM" and "fc.weight" in tensors)


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else "none"


def _sizes(folder: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """The number of tokens of the vocabulary, and of weights per row."""
    inner = config.get("transformer_layer_config", config)
    num_tokens, width = (inner.get(key) if isinstance(inner, dict) else None for key in ("vocab_size", "hidden_size"))
    for value in (num_tokens, width):
        if type(value) is not int or not 0 < value <= MAX_TOKENS:
            raise UsageError(f"{folder / 'config.json'}: names no vocab_size or no hidden_size; use a language model")
    return cast("tuple[int, int]", (num_tokens, width))


def _texts(data: Mapping[str, Any]) -> tuple[dict[int, str], set[int], set[int]]:
    """From a tokenizer.json: the text of each id, the ids of added tokens, and those of them that are control tokens.

    Malformed data raises errors of several types; the caller handles them.
    """
    entries = data["model"]["vocab"]
    if isinstance(entries, dict):
        text_of = {id: text for text, id in entries.items()}
    else:
        text_of = {id: entry[0] for id, entry in enumerate(entries)}
    tokens = data.get("added_tokens") or []
    text_of |= {token["id"]: token["content"] for token in tokens}
    if not all(type(id) is int and id >= 0 and isinstance(text, str) for id, text in text_of.items()):
        raise ValueError
    return text_of, {token["id"] for token in tokens}, {token["id"] for token in tokens if token.get("special")}


def _named(config: Mapping[str, Any]) -> set[int]:
    """The token ids that the configuration names, such as EOS."""
    ids: set[int] = set()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        ids |= {id for id in (value if isinstance(value, list) else [value]) if type(id) is int and id >= 0}
    return ids


def _config(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise UsageError(f"{path}: larger than {JSON_LIMIT >> 20} MiB; name a model")
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); name the folder of a complete checkpoint") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: no JSON object; name the folder of a complete checkpoint")
    return data
