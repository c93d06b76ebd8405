"""Opens the draft models that a profile's proposers name.

Resolves drafter folders and GGUF files, and does not depend on the planner or on how a draft is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specplug.core import Proposer
from specplug.engines.llama_cpp.context import Context, Inputs, open_context
from specplug.engines.llama_cpp.drafters.model_drafter import ModelDrafter
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.rollback import rollback_of
from specplug.errors import UsageError
from specplug.machine import fingerprint
from specplug.models import drafter_folders, references
from specplug.profile import Runtime
from specplug.proposers.draft_model import DraftModel
from specplug.proposers.vocab_trim import VocabTrim
from specplug.transforms.gguf_head import EMBEDDINGS, MODEL


class Drafters:
    """The open drafters of one engine, by the index of their proposer."""

    def __init__(self) -> None:
        self._opened: dict[int, ModelDrafter] = {}

    def open(self, sources: Sequence[Proposer], target: Context, runtime: Runtime, *, slots: int) -> None:
        """Open the models that `sources` name. Raises UsageError where one is missing or does not fit the target.

        runtime  that of the target; a drafter runs with the same one, so that it can copy the target's cells
        """
        for place, source in enumerate(sources):
            if isinstance(source, DraftModel):
                self._opened[place] = _open(source, target, runtime, slots)

    def in_place(self, sources: Sequence[Proposer]) -> list[Proposer]:
        """The proposers, with the open drafter in place of each one that names a model; drafters are reset."""
        for drafter in self._opened.values():
            drafter.forget()
        return [self._opened.get(place, source) for place, source in enumerate(sources)]

    def close(self) -> None:
        for drafter in self._opened.values():
            drafter.close()
        self._opened.clear()


def _open(source: DraftModel, target: Context, runtime: Runtime, slots: int) -> ModelDrafter:
    if isinstance(source, VocabTrim):
        folder = drafter_folders.resolve(source.model, source.build)
        manifest, ids = drafter_folders.read(folder)
        if manifest.format != "gguf":
            raise UsageError(f"{folder}: this is a drafter for vLLM; build one from a GGUF model")
        drafter_folders.check_target(
            manifest, folder, references.tokenizer_hash(target.model.path), target.model.path.name
        )
        from specplug.engines.llama_cpp.drafters.input_table import InputTable

        table: Inputs | None = InputTable(folder / EMBEDDINGS, manifest.input_scale)
        same = _same_model(manifest.source, target.model.path)
        path = folder / MODEL
    else:
        path, ids, table, same = references.resolve(source.model), None, None, False
        own, required = references.tokenizer_hash(path), references.tokenizer_hash(target.model.path)
        if own != required:
            raise UsageError(
                f"{path}: its tokenizer is {own[:12]}, that of {target.model.path.name} is {required[:12]}; "
                "choose a drafter of the target's family"
            )
    model = open_model(path, runtime)
    try:
        context = _context(model, table, runtime, slots, source.max_draft)
    except BaseException:
        model.close()
        raise
    drafter = ModelDrafter(
        context,
        ids,
        slots=slots,
        max_tokens=runtime.context,
        max_draft=source.max_draft,
        branches=source.branches,
        end_tokens=target.model.end_tokens,
        target_cells=target.state if same else None,
    )
    drafter.warm_up()
    return drafter


def _context(model: Model, table: Inputs | None, runtime: Runtime, slots: int, max_draft: int) -> Context:
    rollback_of(model)  # raises for a model that cannot take draft tokens back
    cells = slots * (runtime.context + max_draft + 1)
    return open_context(model, runtime, cells=-(-cells // 256) * 256, num_ids=slots, max_rows=1, inputs=table)


def _same_model(source: object, target: Path) -> bool:
    """Whether a drafter was made from the target's own file, so that both compute the same keys and values."""
    identity = fingerprint.model_identity(target)
    return isinstance(source, dict) and all(source.get(key) == identity[key] for key in ("bytes", "sample_sha256"))
