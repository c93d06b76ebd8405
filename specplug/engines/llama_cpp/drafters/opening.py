"""Opens the draft models that a profile's proposers name.

Resolves drafter folders and GGUF files, and does not depend on the planner or on how a draft is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from specplug import registry
from specplug.core import IntArray, Proposer
from specplug.engines.llama_cpp.context import Context, Inputs, cache_bytes, open_context
from specplug.engines.llama_cpp.drafters.model_drafter import (
    SCORE_CONTEXT,
    SCORED_ROWS,
    ModelDrafter,
    cells_per_slot,
)
from specplug.engines.llama_cpp.engine_settings import can_offload
from specplug.engines.llama_cpp.memory_need import MemoryNeed, check_memory, memory_need
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.rollback import rollback_of
from specplug.engines.llama_cpp.setting_warnings import setting_warnings
from specplug.errors import UsageError
from specplug.machine import fingerprint
from specplug.machine.memory import available_memory, gib
from specplug.models import drafter_folders, references
from specplug.profile import Profile, Runtime
from specplug.proposers.draft_model import DraftModel
from specplug.proposers.vocab_trim import VocabTrim
from specplug.transforms.gguf_head import EMBEDDINGS, MODEL


class Drafters:
    """The open drafters of one engine, by the index of their proposer."""

    def __init__(self) -> None:
        self.files: dict[int, Path] = {}
        """The model file of each drafter."""
        self._opened: dict[int, ModelDrafter] = {}

    def open(
        self,
        sources: Sequence[Proposer],
        target: Context,
        runtime: Runtime,
        *,
        slots: int,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        """Open the models that `sources` name. Raises UsageError where one is missing or does not fit the target.

        runtime  that of the target; a drafter runs with the same one, so that it can copy the target's cells
        """
        for place, source in enumerate(sources):
            if isinstance(source, DraftModel):
                found = _find(source, target.model.path)
                self.files[place] = found.path
                self._opened[place] = _open(source, found, target, runtime, slots, notify)

    def in_place(self, sources: Sequence[Proposer]) -> list[Proposer]:
        """The proposers, with the open drafter in place of each one that names a model; drafters are reset."""
        for drafter in self._opened.values():
            drafter.forget()
        return [self._opened.get(place, source) for place, source in enumerate(sources)]

    def use_threads(self, threads: int) -> None:
        for drafter in self._opened.values():
            drafter.use_threads(threads)

    def close(self) -> None:
        for drafter in self._opened.values():
            drafter.close()
        self._opened.clear()


def open_target(path: Path, profiles: Iterable[Profile], runtime: Runtime, notify: Callable[[str], None]) -> Model:
    """The model in a GGUF file, after `check_drafters`. `notify` also receives what `setting_warnings` finds."""
    offloads = bool(runtime.gpu_layers) and can_offload()
    check_drafters(path, profiles, offloads=offloads, runtime=runtime, notify=notify)
    model = open_model(path, runtime, notify)
    for warning in setting_warnings(model, runtime):
        notify(warning)
    return model


def check_drafters(
    target: Path,
    profiles: Iterable[Profile],
    *,
    offloads: bool,
    runtime: Runtime | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> None:
    """Raise UsageError, before anything is loaded, for a drafter that is missing, damaged or of another tokenizer, and
    where the memory does not hold the model and its drafters. `notify` receives a warning about one that is too large.

    offloads  whether layers are on a GPU, so that the memory of the machine does not decide
    runtime   that of the target's context; None where weights alone are compared with the memory
    """
    available, warned = available_memory(), set()
    context = runtime.context if runtime is not None else 0
    runtime = runtime or Runtime()
    needed = memory_need(target, runtime, context)
    tried: list[list[tuple[Path, MemoryNeed]]] = [[]]
    for profile in profiles:
        tried.append([])
        for source in registry.build_sources(profile.proposers):
            if not isinstance(source, DraftModel):
                continue
            found = _find(source, target)
            own = memory_need(found.path, runtime, _cells(source, context, slots=1) if context else 0)
            table = found.table[0].stat().st_size if found.table is not None else 0
            tried[-1].append((found.path, replace(own, weights=own.weights + table)))
            if own.weights >= needed.weights and found.path not in warned:
                warned.add(found.path)
                notify(
                    f"the model {target.name} has {gib(needed.weights)} GiB, the drafter {found.path.name} "
                    f"{gib(own.weights)} GiB: a drafter that is as large as its target can hardly save time"
                )
    if not offloads:
        for drafters in tried:
            warning = check_memory(target, needed, drafters, available, runtime.kv_type)
            if warning is not None and not drafters:
                notify(warning)


@dataclass(frozen=True, slots=True)
class _Found:
    """The files of a drafter.

    path   its model
    ids    int32[rows of the head]: the token of each row; None if row i belongs to token i
    table  its embeddings and their scale; None where the model has them
    same   whether it was made from the target's own file, so that both compute the same keys and values
    """

    path: Path
    ids: IntArray | None = None
    table: tuple[Path, float] | None = None
    same: bool = False


def _find(source: DraftModel, target: Path) -> _Found:
    """The files of a drafter. Raises UsageError where they are missing, damaged or of another tokenizer."""
    if isinstance(source, VocabTrim):
        folder = drafter_folders.resolve(source.model, source.build)
        manifest, ids = drafter_folders.read(folder)
        if manifest.format != "gguf":
            raise UsageError(f"{folder}: this is a drafter for vLLM; build one from a GGUF model")
        drafter_folders.check_target(manifest, folder, references.tokenizer_hash(target), target.name)
        same = _same_model(manifest.source, target)
        return _Found(folder / MODEL, ids, (folder / EMBEDDINGS, manifest.input_scale), same)
    path = references.resolve(source.model, "gguf")
    if path.is_dir():
        raise UsageError(f"{path}: a folder; a drafter for llama.cpp is a .gguf file")
    own, required = references.tokenizer_hash(path), references.tokenizer_hash(target)
    if own != required:
        raise UsageError(
            f"{path}: its tokenizer is {own[:12]}, that of {target.name} is {required[:12]}; "
            "choose a drafter of the target's family"
        )
    return _Found(path)


def _cells(source: DraftModel, max_tokens: int, slots: int) -> int:
    """KV cells of a drafter for `slots` sequences of up to `max_tokens` tokens."""
    cells = slots * cells_per_slot(max_tokens, source.max_draft, source.window) + SCORE_CONTEXT + SCORED_ROWS
    return -(-cells // 256) * 256


def _open(
    source: DraftModel,
    found: _Found,
    target: Context,
    runtime: Runtime,
    slots: int,
    notify: Callable[[str], None] | None,
) -> ModelDrafter:
    table: Inputs | None = None
    if found.table is not None:
        from specplug.engines.llama_cpp.drafters.input_table import InputTable

        table = InputTable(*found.table)
    model = open_model(found.path, runtime, notify)
    try:
        rollback_of(model)  # raises for a model that cannot take draft tokens back
        context = open_context(
            model,
            runtime,
            cells=_cells(source, runtime.context, slots),
            num_ids=slots + 1,
            max_rows=max(slots, SCORED_ROWS),
            inputs=table,
        )
    except BaseException:
        model.close()
        raise
    drafter = ModelDrafter(  # which closes both
        context,
        found.ids,
        slots=slots,
        max_tokens=runtime.context,
        max_draft=source.max_draft,
        branches=source.branches,
        end_tokens=target.model.end_tokens,
        window=source.window,
        target_cells=target.state if found.same else None,
        cell_bytes=cache_bytes(model, runtime, 1),
    )
    try:
        drafter.warm_up()
    except BaseException:
        drafter.close()
        raise
    return drafter


def _same_model(source: object, target: Path) -> bool:
    """Whether a drafter was made from the target's own file."""
    identity = fingerprint.model_identity(target)
    return isinstance(source, dict) and all(source.get(key) == identity[key] for key in ("bytes", "sample_sha256"))
