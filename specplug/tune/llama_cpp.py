"""The tuning subject for llama.cpp: the measurements of `tune` on this engine.

This module does not depend on the budget or on settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from specplug.bench.arms import Arm, ProfileArm, PromptStates
from specplug.core import DraftLimits, IntArray, Requires
from specplug.engines.llama_cpp import settings_table
from specplug.errors import SpecplugError, UsageError
from specplug.machine import hardware
from specplug.machine.memory import available_memory
from specplug.planning.constants import JUDGED_TOP
from specplug.planning.request_time import SettingCosts
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.tune.candidates import Setting, grid
from specplug.tune.cost_curves import Curve, Progress, choose_threads, measure_costs
from specplug.tune.device_settings import EnginePlanning
from specplug.tune.drafter_trace import DrafterTrace, TracedExit
from specplug.tune.engine_choice import with_setting
from specplug.tune.expense import Expense, Line
from specplug.tune.method_times import timed_steps
from specplug.tune.off_path import OFF_PATH_IDS, off_path_rows
from specplug.tune.prediction import Costs
from specplug.tune.trace import Answer, OffPathRows, Recorder, Trace

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.context import Context
    from specplug.engines.llama_cpp.measure import PassTimer
    from specplug.engines.llama_cpp.model import Model

EXACT_NODES = 24
"""Under `exact`, the largest draft, in tokens, for which rounding is measured."""

SOME_TOKENS = 128
"""Tokens of the answer of the request by which attention and cache are compared before weights are varied."""

SECONDS_FOR_WEIGHTS = 10.0
"""In less time for all settings, those for weights are not varied: they change little."""

MEMORY_SHARE = 0.5
"""Settings for weights are tried where the copies that they need take at most this share of the free memory."""

DRAFTED, TIMED_TOKENS = 4, 32
"""Tokens of the chains, and of the answers, by which the cost of a draft token is measured beside the target."""


class LlamaCppSubject:
    """A GGUF model with the engine settings of a profile."""

    batched = False
    engine_planning: EnginePlanning | None = None
    own_drafters: Sequence[ProposerSpec] = ()

    def __init__(
        self,
        model_path: Path,
        profile: Profile,
        *,
        drafters: Sequence[ProposerSpec] = (),
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """EngineError without llama-cpp-python; UsageError for a model, profile or drafter that cannot be used."""
        from specplug.engines.llama_cpp import require

        require()
        from specplug.engines.llama_cpp.drafters.finding import copies_spans
        from specplug.engines.llama_cpp.drafters.opening import open_target
        from specplug.engines.llama_cpp.engine import PROVIDES
        from specplug.engines.llama_cpp.settings_choice import with_settings

        self.provides: Requires = PROVIDES
        self._path, self._base = model_path, profile.runtime
        drafting = [replace(profile, proposers=(spec,)) for spec in drafters]
        model = open_target(model_path, drafting, profile.runtime, notify)
        if copies_spans(model_path):
            self.own_drafters = (ProposerSpec("short_context"),)
        self.profile = with_settings(profile, model)
        runtime = self.profile.runtime
        self._notify = notify
        self._limits: dict[int, DraftLimits] = {}
        self._opened = {(runtime.repack, runtime.mmap, runtime.gpu_layers): model}
        self._most_context = self.profile.runtime.context
        self._prompts: dict[Runtime, PromptStates] = {}

    def about(self) -> dict[str, Any]:
        return {"description": self._model.description, "train_context": self._model.train_context}

    def use(self, *, threads: int | None = None, threads_batch: int | None = None, context: int | None = None) -> None:
        runtime = self.profile.runtime
        self.profile = replace(
            self.profile,
            runtime=replace(
                runtime,
                threads=threads or runtime.threads,
                threads_batch=threads_batch or runtime.threads_batch,
                context=context or runtime.context,
            ),
        )

    def use_setting(self, setting: Runtime) -> None:
        self.profile = replace(self.profile, runtime=with_setting(self.profile.runtime, setting))

    @property
    def _model(self) -> Model:
        """The model, opened with the settings for weights of the profile."""
        return self._models(self.profile.runtime)

    def _models(self, runtime: Runtime) -> Model:
        """The model, opened with the settings for weights of `runtime`; each combination is opened once."""
        key = runtime.repack, runtime.mmap, runtime.gpu_layers
        if key not in self._opened:
            from specplug.engines.llama_cpp.model import open_model

            self._opened[key] = open_model(self._path, runtime)
        return self._opened[key]

    def measure_settings(
        self, contexts: Sequence[int], sequences: int, seconds: float, progress: Progress
    ) -> tuple[dict[Runtime, SettingCosts], Runtime, list[str]]:
        """Attention kernels and cache types first; then, under the fastest of them, the settings for weights."""
        from specplug.engines.llama_cpp.engine_settings import attention_settings, can_offload, measure_settings, stock
        from specplug.engines.llama_cpp.settings_choice import EQUAL

        runtime = self.profile.runtime
        if self.profile.exact:  # the settings are those that `exact` needs
            return {}, stock(runtime), []
        began = perf_counter()
        open_ = replace(runtime, flash_attention=self._base.flash_attention, kv_type=self._base.kv_type)
        if sequences > 1 and open_.flash_attention is None:  # it skips the cells of other sequences
            open_ = replace(open_, flash_attention=True)
        own = stock(runtime)
        attention = attention_settings(open_)
        equal = [one for one in attention if (one.flash_attention, one.kv_type) == EQUAL]
        first = [*attention, *([] if own in attention else [own])]
        named = self._base.flash_attention is not None or self._base.kv_type is not None
        keep = first if named else [own, *equal]
        busy = hardware.busy_warning() is not None
        unmeasured: list[str] = []

        def left_out(setting: Runtime, reason: str) -> None:
            reason = reason.replace(str(self._path), self._path.name)
            unmeasured.append(f"{settings_table.label(setting)}: not measured: {reason}")

        table = measure_settings(
            self._models,
            first,
            contexts,
            0.7 * seconds,
            keep=keep,
            progress=lambda part: progress(0.7 * part),
            left_out=left_out,
        )
        allowed = [one for one in table if one in attention]
        if not allowed:  # no cache fits into memory twice
            return {}, own, unmeasured
        best = min(allowed, key=lambda one: table[one].plain_ms(contexts[-1], SOME_TOKENS))
        tried = self._other_weights(best, offload=can_offload())
        if tried and seconds >= SECONDS_FOR_WEIGHTS and perf_counter() - began < 0.8 * seconds:
            table |= measure_settings(
                self._models,
                [best, *tried],
                contexts,
                0.3 * seconds,
                progress=lambda part: progress(0.7 + 0.3 * part),
                left_out=left_out,
            )
            self._close_models(keep=best)
        if not busy:
            with suppress(SpecplugError):  # then `doctor` knows nothing of it
                settings_table.remember(self._path, table)
        return table, own, unmeasured

    def _other_weights(self, best: Runtime, *, offload: bool) -> list[Runtime]:
        """The settings for weights to try besides `best`: those that the user left as they are, while there is memory
        for the copies of the weights that they need."""
        copies = 2 * self._path.stat().st_size
        if copies > MEMORY_SHARE * available_memory().free:
            return []
        tried = []
        if best.repack:
            tried.append(replace(best, repack=False))
        if best.mmap:
            tried.append(replace(best, mmap=False))
        if offload and not best.gpu_layers:
            tried.append(replace(best, gpu_layers=-1))
        return tried

    def _close_models(self, keep: Runtime) -> None:
        for key in [key for key in self._opened if key != (keep.repack, keep.mmap, keep.gpu_layers)]:
            self._opened.pop(key).close()

    def settings_to_try(self, most_nodes: int, named: Sequence[ProposerSpec]) -> list[Setting]:
        return grid(self.provides, most_nodes=most_nodes, named=named)

    def limits(self, sequences: int) -> tuple[bool, int]:
        from specplug.engines.llama_cpp.context import MAX_SEQUENCE_IDS
        from specplug.engines.llama_cpp.engine import LlamaCpp
        from specplug.engines.llama_cpp.rollback import AnyTail

        most = MAX_SEQUENCE_IDS - AnyTail().num_ids(sequences, 0)
        if not self.profile.exact:
            return False, most
        planner = PlannerSettings(max_nodes=min(most, EXACT_NODES))
        drafting = replace(self.profile, proposers=(ProposerSpec("ngram"),), planner=planner, measured=None)
        free = CostPoints((1,), (1, planner.max_nodes + 1), ((1.0, 1.0),))
        try:
            with LlamaCpp(self._model, drafting, cost=free) as engine:
                return engine.padded, engine.profile.planner.max_nodes
        except UsageError:  # with any draft, passes would round differently
            return False, 0

    def memory_limits(self, sequences: int) -> DraftLimits:
        from specplug.engines.llama_cpp.state_memory import rollback_for

        if sequences not in self._limits:
            own = replace(self.profile, exact=False)
            self._limits[sequences] = rollback_for(self._model, own, slots=sequences, notify=self._notify).limits
        return self._limits[sequences]

    def encode(self, messages: Sequence[dict[str, str]]) -> IntArray:
        return self._model.chat_prompt(messages)

    def text(self, tokens: Sequence[int]) -> str:
        return self._model.text(tokens)

    def choose_threads(self, seconds: float) -> tuple[int, int, dict[int, float]]:
        with self.timer(1, 128, 4) as timer:
            timer.fill(64)
            return choose_threads(timer, hardware.usable_cores(), seconds)

    def measure_costs(self, levels: Sequence[int], seconds: float, progress: Progress) -> Iterator[Curve]:
        return measure_costs(self.timer, levels, self._most_context, seconds, progress)

    @contextmanager
    def timer(self, sequences: int, tokens: int, limit: int) -> Iterator[PassTimer]:
        """A timer of passes of up to `limit` rows over sequences of up to `tokens` tokens."""
        from specplug.engines.llama_cpp.measure import PassTimer

        num_ids = 2 * sequences if self._model.has_recurrent_memory else sequences + 1
        snapshots = self.memory_limits(sequences).depth or 0
        with self._context(sequences * tokens + limit, num_ids=num_ids, max_rows=limit, snapshots=snapshots) as context:
            yield PassTimer(context, sequences)

    def record(
        self,
        prompts: Sequence[IntArray],
        max_tokens: int,
        k: int,
        slots: int,
        done: Callable[[int, IntArray, IntArray], None],
    ) -> None:
        from specplug.engines.llama_cpp.engine import LlamaCpp
        from specplug.generation.answers import Request

        slots = min(slots, len(prompts))
        longest = max(map(len, prompts)) + max_tokens
        runtime = replace(self.profile.runtime, context=-(-longest // 256) * 256)
        specs = (ProposerSpec("none"),)
        plain = replace(self.profile, proposers=specs, planner=PlannerSettings(mode="static"), runtime=runtime)
        recorder = Recorder(min(k, self._model.num_tokens))
        with LlamaCpp(self._model, plain, slots=slots) as engine:
            engine.reset([recorder])
            engine.generate_all(
                [Request(prompt, max_tokens) for prompt in prompts],
                lambda index, answer: done(index, *recorder.recorded.pop()),
            )

    def record_off_path_rows(self, answers: Sequence[Answer]) -> Iterator[OffPathRows | None]:
        if self._model.has_recurrent_memory:  # which verifies chains only
            yield from [None] * len(answers)
            return
        cells = max((len(answer.prompt) + len(answer.tokens) for answer in answers), default=1) + 2 * OFF_PATH_IDS
        with self._context(cells, num_ids=OFF_PATH_IDS + 1, max_rows=OFF_PATH_IDS) as context:
            for answer in answers:
                yield off_path_rows(context, answer)

    def measure_expense(self, trace: Trace, methods: Sequence[ProposerSpec], level: int, seconds: float) -> Expense:
        prompts = [answer.prompt for answer in trace.answers[: len(trace.categories())]]
        every = (ProposerSpec("none"), *methods)
        times = {
            spec.method: timed_steps(self._model, self.profile, prompts, spec, seconds / len(every)) for spec in every
        }
        drafting = [times[spec.method] for spec in methods]
        without_rows = [one for one in drafting if not one.reads_rows]
        with_rows = [one for one in drafting if one.reads_rows]
        plan = Line.through([(nodes, us) for one in without_rows for nodes, _, us in one.plan if nodes])
        idle = [us for one in without_rows for nodes, _, us in one.plan if not nodes]
        rows_read = [(rows, us - plan.ns(nodes) / 1000) for one in with_rows for nodes, rows, us in one.plan if nodes]
        return Expense(
            propose={spec.method: Line.through(times[spec.method].proposed) for spec in methods},
            observe={spec.method: Line.through(times[spec.method].observed) for spec in methods},
            plan=plan,
            idle=Line(float(np.median(idle))) if idle else Line(plan.base),
            topk=Line.through(rows_read),
            step=Line.through([point for one in times.values() for point in one.loop]),
        )

    def trace_drafter(
        self, spec: ProposerSpec, answers: Sequence[Answer], level: int, seconds: float, progress: Progress
    ) -> DrafterTrace:
        """Chains are drafted beside the target first, so that a draft token costs what it costs in use."""
        from specplug.engines.llama_cpp.drafters.chain_drafter import ChainDrafter
        from specplug.engines.llama_cpp.drafters.recorded_guesses import recorded_guesses
        from specplug.engines.llama_cpp.engine import LlamaCpp
        from specplug.generation.answers import Request

        began = perf_counter()
        planner = PlannerSettings(mode="static", max_nodes=DRAFTED * level, trees=False)
        profile = replace(self.profile, proposers=(spec,), planner=planner, exact=False, measured=None)
        free = CostPoints((1,), (1, planner.max_nodes + level), ((1.0, 1.0),))
        with LlamaCpp(self._model, profile, slots=level, cost=free) as engine:
            (drafter,) = engine.speculator.fusion.sources
            assert isinstance(drafter, ChainDrafter)
            drafter.judged_top = JUDGED_TOP  # as beside lookups, so that it is timed, too
            shortest = sorted((answer.prompt for answer in answers), key=len)[: max(level, 2)]
            engine.generate_all([Request(prompt, TIMED_TOKENS) for prompt in shortest])
            guesses = {}
            for answer in answers:
                copied = engine.cached_in(answer.prompt) if spec.method == "short_context" else None
                guesses[answer.prompt_id, answer.turn] = recorded_guesses(
                    drafter, answer.prompt, answer.tokens, JUDGED_TOP, copied
                )
                progress(min(1.0, max(len(guesses) / len(answers), (perf_counter() - began) / max(seconds, 1e-9))))
                if perf_counter() - began > seconds:
                    break
            named = spec.options.get("exit")
            return DrafterTrace(
                drafter.buckets,
                tuple(drafter.pass_ms(rows) for rows in range(1, level + 1)),
                drafter.read_token_ms,
                drafter.retry_ms,
                drafter.max_draft,
                drafter.window,
                guesses,
                drafter.drafted_ids,
                None if named is None else TracedExit(str(spec.options["model"]), named, self._model.num_layers),
                type(drafter).__name__,
            )

    def arm(self, profile: Profile, *, slots: int, costs: Costs) -> Arm:
        from specplug.generation.answers import Sampling

        # `exact` prefills every prompt from its first token.
        prompts = None if profile.exact else self._prompts.setdefault(profile.runtime, PromptStates())
        model = self._models(profile.runtime)
        return ProfileArm(model, profile, Sampling(), slots=slots, cost=costs.points, prompts=prompts)

    def idle_arm(self, *, slots: int, costs: Costs) -> None:
        """None: plain decoding runs on the same engine, in this process."""

    def close(self) -> None:
        for model in self._opened.values():
            model.close()

    @contextmanager
    def _context(self, cells: int, *, num_ids: int, max_rows: int, snapshots: int = 0) -> Iterator[Context]:
        from specplug.engines.llama_cpp.context import open_context

        cells = -(-(cells + 64) // 256) * 256
        with open_context(
            self._model, self.profile.runtime, cells=cells, num_ids=num_ids, max_rows=max_rows, snapshots=snapshots
        ) as one:
            yield one
