"""Finds the files of the drafters that a profile's proposers name, and checks that they fit the target.

Reads folders and headers; opens no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.machine import fingerprint
from specplug.models import drafter_folders, references
from specplug.models.drafter_folders import EARLY_EXIT, MTP_HEAD, Manifest
from specplug.models.gguf_header import read_header
from specplug.models.model_facts import memory_kind
from specplug.proposers.draft_model import DraftModel
from specplug.proposers.early_exit import AUTO, EarlyExit
from specplug.proposers.model_options import ModelOptions
from specplug.proposers.short_context import ShortContext
from specplug.proposers.vocab_trim import VocabTrim
from specplug.transforms.gguf_head import EMBEDDINGS, MODEL
from specplug.transforms.gguf_states_head import NORM_AND_HEAD

NO_SPANS = (
    "it drafts only for models whose layers all attend to the complete text, since parts of other caches cannot be "
    "copied; leave it out, or name a small model with draft_model"
)
"""Why a model cannot draft for itself from a part of the text."""


@dataclass(frozen=True, slots=True)
class Found:
    """The files of a drafter.

    path    its model
    ids     int32[rows of the head]: the token of each row; None if row i belongs to token i
    table   its embeddings and their scale; None where the model has them
    same    whether it is, or was made from, the target's own file, so that both compute the same keys and values
    spans   whether the target's cells of parts of a text can be copied: all layers attend to the complete text
    layers  where it has only the first layers of the target, their number
    head    the norm and the head alone, by which its layers can be scored; None where there is no such file
    """

    path: Path
    ids: IntArray | None = None
    table: tuple[Path, float] | None = None
    same: bool = False
    spans: bool = False
    layers: int | None = None
    head: Path | None = None


def copies_spans(target: Path) -> bool:
    """Whether a model's cells of parts of a text can be copied: all of its layers attend to the complete text."""
    return memory_kind(read_header(target).numbers) == "attention"


def find(source: ModelOptions, target: Path) -> list[Found]:
    """The files of a drafter; of several exits, those of each. UsageError where they are missing, damaged or of another
    tokenizer or model."""
    if isinstance(source, EarlyExit):
        return _exits(source, target)
    if isinstance(source, ShortContext):
        if not copies_spans(target):
            kind = memory_kind(read_header(target).numbers)
            raise UsageError(f"short_context: {target}: its memory is {kind}; {NO_SPANS}")
        return [Found(target, same=True, spans=True)]
    if isinstance(source, VocabTrim):
        folder = drafter_folders.resolve(source.model, source.build)
        manifest, ids = _read(folder, target)
        if manifest.kind == EARLY_EXIT:
            raise UsageError(f"{folder}: a folder of early exits; name it under the method early_exit")
        if manifest.kind == MTP_HEAD:
            raise UsageError(f"{folder}: rows of an MTP layer's output matrix; name it as the head of the method mtp")
        same = is_same_model(manifest.source, target)
        spans = same and copies_spans(target)
        return [Found(folder / MODEL, ids, (folder / EMBEDDINGS, manifest.input_scale), same, spans)]
    assert isinstance(source, DraftModel)
    path = references.resolve(source.model, "gguf")
    if path.is_dir():
        raise UsageError(f"{path}: a folder; a drafter for llama.cpp is a .gguf file")
    own, required = references.tokenizer_hash(path), references.tokenizer_hash(target)
    if own != required:
        raise UsageError(
            f"{path}: its tokenizer is {own[:12]}, that of {target.name} is {required[:12]}; "
            "choose a drafter of the target's family"
        )
    return [Found(path)]


def _exits(source: EarlyExit, target: Path) -> list[Found]:
    if source.model is None:
        raise UsageError(
            "early_exit: exits: layers of the loaded model draft on vLLM only; on llama.cpp name a folder with model, "
            "which specplug build early-exit writes"
        )
    layers = read_header(target).num_layers
    folder = drafter_folders.resolve_exits(source.model, target)
    manifest, ids = _read(folder, target)
    if manifest.kind != EARLY_EXIT:
        raise UsageError(f"{folder}: not a folder of early exits; build one: specplug build early-exit {target.name}")
    if not is_same_model(manifest.source, target):
        raise UsageError(
            f"{folder}: its exits were made from {_described(manifest.source)}, the target is "
            f"{_described(fingerprint.model_identity(target))}; build exits of the target's own file"
        )
    for one in manifest.exits:
        if not read_header(folder / one.file).num_layers == one.layers < layers:
            raise UsageError(f"{folder / one.file}: not the first {one.layers} layers of a model with {layers}")
    chosen = [one for one in manifest.exits if source.exit in (AUTO, one.layers)]
    if not chosen:
        known = ", ".join(str(one.layers) for one in manifest.exits)
        raise UsageError(f"{folder}: it has no exit after {source.exit} layers; use auto, or one of {known}")
    trimmed = EMBEDDINGS in manifest.files
    table = (folder / EMBEDDINGS, manifest.input_scale) if trimmed else None
    head = folder / NORM_AND_HEAD if NORM_AND_HEAD in manifest.files else None
    return [
        Found(
            folder / one.file,
            ids if trimmed else None,
            table,
            one.copied == one.layers,
            layers=one.layers,
            head=head,
        )
        for one in chosen
    ]


def _read(folder: Path, target: Path) -> tuple[Manifest, IntArray]:
    manifest, ids = drafter_folders.read(folder)
    if manifest.format != "gguf":
        raise UsageError(f"{folder}: this is a drafter for vLLM; build one from a GGUF model")
    drafter_folders.check_target(manifest, folder, references.tokenizer_hash(target), target.name)
    return manifest, ids


def is_same_model(source: Mapping[str, Any], target: Path) -> bool:
    """Whether a drafter was made from the target's own file."""
    identity = fingerprint.model_identity(target)
    return all(source.get(key) == identity[key] for key in ("bytes", "sample_sha256"))


def _described(identity: Mapping[str, Any]) -> str:
    return f"{identity.get('file')} ({str(identity.get('sample_sha256'))[:12]})"
