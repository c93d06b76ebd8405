"""Opens the draft models that a profile's proposers name.

Does not depend on the planner or on how a draft is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from specplug import registry
from specplug.core import Proposer
from specplug.engines.llama_cpp.context import Context, Inputs, cache_bytes, open_context
from specplug.engines.llama_cpp.drafters.chain_drafter import SCORE_CONTEXT, SCORED_ROWS
from specplug.engines.llama_cpp.drafters.exit_drafter import ExitDrafter
from specplug.engines.llama_cpp.drafters.exit_opening import open_scoring, scoring_cells, target_cells
from specplug.engines.llama_cpp.drafters.exit_scoring import ExitScoring
from specplug.engines.llama_cpp.drafters.finding import NO_SPANS, Found, find
from specplug.engines.llama_cpp.drafters.head_drafter import HeadDrafter
from specplug.engines.llama_cpp.drafters.head_finding import find_head, loads_mtp
from specplug.engines.llama_cpp.drafters.head_opening import head_need, open_head
from specplug.engines.llama_cpp.drafters.model_drafter import ModelDrafter
from specplug.engines.llama_cpp.drafters.slot_cells import cells_per_slot
from specplug.engines.llama_cpp.engine_settings import can_offload
from specplug.engines.llama_cpp.memory_need import MemoryNeed, check_memory, memory_need
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.rollback import refuse_recurrent
from specplug.engines.llama_cpp.setting_warnings import setting_warnings
from specplug.engines.llama_cpp.stream import Pass
from specplug.errors import SpecplugError, UsageError
from specplug.machine.memory import available_memory, gib
from specplug.profile import Profile, Runtime
from specplug.proposers.draft_model import DraftModel
from specplug.proposers.eagle3 import Eagle3
from specplug.proposers.early_exit import EarlyExit
from specplug.proposers.model_options import ModelOptions
from specplug.proposers.mtp import Mtp
from specplug.proposers.short_context import ShortContext


class Drafters:
    """The open drafters of one engine, by the index of their proposer."""

    def __init__(self) -> None:
        self.files: dict[int, Path] = {}
        """The model file of each drafter: the target's own where it drafts itself, the first of several exits."""
        self._opened: dict[int, ModelDrafter | ExitDrafter | HeadDrafter] = {}
        self._scoring: dict[ExitScoring, ExitDrafter] = {}
        self._following: list[HeadDrafter] = []
        self._models: list[Model] = []
        self._notify: Callable[[str], None] | None = None

    def open(
        self,
        sources: Sequence[Proposer],
        target: Context,
        runtime: Runtime,
        *,
        slots: int,
        static: bool = False,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        """Open the models that `sources` name. Raises UsageError where one is missing or does not fit the target.

        runtime  that of the target; a drafter runs with the same one, so that it can copy the target's cells
        static   whether all drafts are verified, so that a single exit always drafts
        """
        self._notify = notify
        for place, source in enumerate(sources):
            if isinstance(source, Mtp | Eagle3):
                path = self.files[place] = find_head(source, target.model.path)
                head, own = open_head(source, path, target, runtime, slots=slots, notify=notify)
                self._opened[place] = head
                self._following.append(head)
                self._models += [own] if own is not None else []
                continue
            if not isinstance(source, ModelOptions):
                continue
            found = find(source, target.model.path)
            _check_window(source, runtime.context)
            self.files[place] = found[0].path
            table: Inputs | None = None
            if found[0].table is not None:
                from specplug.engines.llama_cpp.drafters.input_table import InputTable

                table = InputTable(*found[0].table)
            opened: list[ModelDrafter] = []
            try:
                for one in found:
                    model = target.model
                    if isinstance(source, (DraftModel, EarlyExit)):
                        model = open_model(one.path, runtime, notify)
                        self._models.append(model)
                    opened.append(_open(source, one, table, model, target, runtime, slots))
                self._opened[place] = opened[0]
                if isinstance(source, EarlyExit) and not (static and len(opened) == 1):
                    self._opened[place] = self._exits(source, found, opened, target, runtime)
            except BaseException:
                self._opened.pop(place, None)
                for drafter in opened:
                    drafter.close()
                raise

    def in_place(self, sources: Sequence[Proposer]) -> list[Proposer]:
        """The proposers, with the open drafter in place of each one that names a model; drafters are reset."""
        for one in (*self._opened.values(), *self._scoring):
            one.forget()
        return [self._opened.get(place, source) for place, source in enumerate(sources)]

    def after_pass(self, passed: Pass) -> None:
        """Let drafters learn from a pass of the target whose tokens are emitted, before the proposers observe them."""
        for head in list(self._following):
            try:
                head.follow(passed)
            except (SpecplugError, ValueError) as error:  # the step goes on; this head, without states, drafts no more
                self._following.remove(head)
                if self._notify is not None:
                    self._notify(f"a head drafts no more: {error}")
        for scoring in list(self._scoring):
            try:
                scoring(passed)
            except (SpecplugError, ValueError) as error:  # the step goes on, and later ones without it
                self._scoring.pop(scoring).scored_beside = False
                scoring.close()
                if self._notify is not None:
                    self._notify(f"exits that do not draft are no longer scored: {error}")

    def use_threads(self, threads: int) -> None:
        for one in (*self._opened.values(), *self._scoring):
            one.use_threads(threads)

    def close(self) -> None:
        for one in (*self._opened.values(), *self._scoring):
            one.close()
        for model in self._models:
            model.close()
        self._opened.clear()
        self._scoring.clear()
        self._following.clear()
        self._models.clear()

    def _exits(
        self,
        source: EarlyExit,
        found: Sequence[Found],
        opened: Sequence[ModelDrafter],
        target: Context,
        runtime: Runtime,
    ) -> ExitDrafter:
        """The drafter that uses one of the exits, or none, as they are scored by the target's hidden states if
        possible."""
        layers = [one.layers for one in found if one.layers is not None]
        total = target.model.num_layers
        drafter = ExitDrafter(layers, opened, total=total, by_layers=source.rule == "layers")
        scoring = open_scoring(drafter, found[0], target, runtime)
        if scoring is not None:
            self._scoring[scoring] = drafter
            drafter.scored_beside = True
        return drafter


def open_target(path: Path, profiles: Iterable[Profile], runtime: Runtime, notify: Callable[[str], None]) -> Model:
    """The model in a GGUF file, after `check_drafters`. `notify` also receives what `setting_warnings` finds."""
    profiles = list(profiles)
    offloads = bool(runtime.gpu_layers) and can_offload()
    check_drafters(path, profiles, offloads=offloads, runtime=runtime, notify=notify)
    sources = [source for profile in profiles for source in registry.build_sources(profile.proposers)]
    model = open_model(path, runtime, notify, mtp=any(loads_mtp(source, path) for source in sources))
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
    """Raise UsageError, before anything is loaded, for a drafter that is missing, damaged or of another tokenizer,
    for a window that does not fit the context or the model, and where the memory does not hold the model and its
    drafters. `notify` receives a warning about a drafter that is too large.

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
            if isinstance(source, Mtp | Eagle3):
                path = find_head(source, target)
                tried[-1].append((path, head_need(source, path, target, runtime, context)))
                continue
            if not isinstance(source, ModelOptions):
                continue
            every = find(source, target)
            _check_window(source, context)
            for place, found in enumerate(every):
                own = memory_need(found.path, runtime, _cells(source, context, slots=1) if context else 0)
                table = found.table[0].stat().st_size if found.table is not None and not place else 0
                own = replace(own, weights=0 if isinstance(source, ShortContext) else own.weights + table)
                tried[-1].append((found.path, own))
                if found.head is not None and not place:
                    cells = scoring_cells(len(every)) if context else 0
                    tried[-1].append((found.head, memory_need(found.head, runtime, cells)))
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


def _check_window(source: ModelOptions, context: int) -> None:
    """Raise UsageError for a window that leaves out nothing; `context` is 0 where it is not known."""
    window = source.window
    if window is None or not (window.retrieved or isinstance(source, ShortContext)):
        return
    if context and window.size >= context:
        raise UsageError(
            f"{registry.name_of(source)}: first, recent and retrieved are {window.size} tokens together, the context "
            f"has {context}; make them smaller, or raise --context"
        )


def _cells(source: ModelOptions, max_tokens: int, slots: int) -> int:
    """KV cells of a drafter for `slots` sequences of up to `max_tokens` tokens."""
    cells = slots * cells_per_slot(max_tokens, source.max_draft, source.window) + SCORE_CONTEXT + SCORED_ROWS
    return -(-cells // 256) * 256


def _open(
    source: ModelOptions,
    found: Found,
    table: Inputs | None,
    model: Model,
    target: Context,
    runtime: Runtime,
    slots: int,
) -> ModelDrafter:
    refuse_recurrent(model, "a drafter")
    if isinstance(source, ShortContext) and model.attends_to_window:  # as some architectures do without a key for it
        raise UsageError(f"short_context: {model.path}: its memory is sliding window; {NO_SPANS}")
    context = open_context(
        model,
        runtime,
        cells=_cells(source, runtime.context, slots),
        num_ids=slots + 1,
        max_rows=max(slots, SCORED_ROWS),
        inputs=table,
    )
    copied = found.same if source.window is None else found.spans and not target.model.attends_to_window
    drafter = ModelDrafter(  # which closes the context
        context,
        found.ids,
        slots=slots,
        max_tokens=runtime.context,
        max_draft=source.max_draft,
        branches=source.branches,
        end_tokens=target.model.end_tokens,
        is_control=target.model.is_control,
        window=source.window,
        # The id after that of retained cells is used within a pass only.
        target_cells=target_cells(found, target, context, spare=slots + 1) if copied else None,
        cell_bytes=cache_bytes(target.model if found.layers is not None else model, runtime, 1),
    )
    try:
        drafter.warm_up()
    except BaseException:
        drafter.close()
        raise
    return drafter
