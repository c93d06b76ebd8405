"""The tuning subject for vLLM in its V1 runner, and what both runners share: the measurements of `tune`.

This module does not depend on the budget. Two engines are open at once: one that decodes plainly, with vLLM's defaults,
and one that drafts with each setting in turn, because starting an engine takes 40 s on two cores. A drafter of vLLM's
own gets a third engine. Costs are measured in another one, before anything is drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NoReturn

import numpy as np

from specplug.bench.arms import Arm, plain
from specplug.bench.statistics import median_interval
from specplug.bench.vllm_stage import SwitchedArm, VllmArm, is_ours
from specplug.core import NO_LIMITS, DraftLimits, IntArray, int_array
from specplug.drafts.chains import ChainProposer
from specplug.engines.vllm.configure import NAME, PROVIDES, engine_settings, write_profile
from specplug.engines.vllm.environment import shared_memory
from specplug.engines.vllm.measure import BATCHES, CONTEXTS, TimedPass, by_batch, passes, rows_of
from specplug.engines.vllm.offline import Vllm, open_vllm
from specplug.engines.vllm.switch import SWITCH
from specplug.errors import EngineError
from specplug.generation.answers import Request, Sampling
from specplug.machine import fingerprint
from specplug.planning.request_time import SettingCosts
from specplug.profile import CostPoints, Measured, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.tune.candidates import LONGEST, Setting, grid
from specplug.tune.cost_curves import Curve, Progress
from specplug.tune.device_settings import EnginePlanning
from specplug.tune.expense import Expense, Line, RealClock, TimedChains
from specplug.tune.prediction import Costs
from specplug.tune.replay import grouped
from specplug.tune.replay_batch import BatchReplay
from specplug.tune.trace import Answer, OffPathRows, Trace

FEWEST_SEQUENCES = 16
"""Every engine is opened for at least this many sequences at once, so that batches of a busy server are timed, too."""

ENGINES = 3
"""Most engines that are open at once: plain, drafting, and one with a drafter of vLLM's own."""

PROMPTS, PROMPT_TOKENS = 3, 192
"""Prompts, and tokens of each, with which prefill is timed."""

_FREE = CostPoints((0,), (1, 1024), ((1.0, 1.0),))
"""Costs with which every draft is verified; used where only drafting is timed."""


class VllmSubject:
    """A model that vLLM runs with the engine settings of a profile."""

    provides = PROVIDES
    batched = True
    engine_planning: EnginePlanning | None = None
    own_drafters: Sequence[ProposerSpec] = ()

    def __init__(self, model: str, profile: Profile, *, most: int, notify: Callable[[str], None]) -> None:
        """At most `most` sequences run at once. EngineError without vLLM; UsageError for settings that vLLM refuses."""
        settings = replace(profile.vllm, max_num_seqs=max(most, FEWEST_SEQUENCES, profile.vllm.max_num_seqs or 0))
        self._model, self._notify = model, notify
        self._drafting: Vllm | None = None
        self.profile = replace(profile, vllm=settings)
        notify("starting vLLM")
        with ExitStack() as stack:
            self._stack = stack
            self._folder = Path(stack.enter_context(TemporaryDirectory(prefix="specplug-tune-")))
            self._plain = self._open(plain(self.profile))
            self._stack = stack.pop_all()
        self._config = self._plain.llm.llm_engine.vllm_config
        context = self._config.model_config.max_model_len
        self.profile = replace(self.profile, runtime=replace(profile.runtime, context=context, threads=None))

    def about(self) -> dict[str, Any]:
        return {"description": self._plain.description, "train_context": self._config.model_config.max_model_len}

    def use(self, *, threads: int | None = None, threads_batch: int | None = None, context: int | None = None) -> None:
        """Does nothing: vLLM manages threads and memory itself."""

    def use_setting(self, setting: Runtime) -> None:
        """Does nothing: there is none to use."""

    def measure_settings(
        self, contexts: Sequence[int], sequences: int, seconds: float, progress: Progress
    ) -> tuple[dict[Runtime, SettingCosts], Runtime, list[str]]:
        """No settings: vLLM chooses kernels and cache type itself."""
        return {}, self.profile.runtime, []

    def settings_to_try(self, most_nodes: int, named: Sequence[ProposerSpec]) -> list[Setting]:
        return grid(self.provides, trees=False, most_nodes=most_nodes, named=named)

    def limits(self, sequences: int) -> tuple[bool, int]:
        return False, LONGEST

    def memory_limits(self, sequences: int) -> DraftLimits:
        return NO_LIMITS

    def encode(self, messages: Sequence[dict[str, str]]) -> IntArray:
        return self._plain.chat_prompt(messages)

    def text(self, tokens: Sequence[int]) -> str:
        return self._plain.text(tokens)

    def choose_threads(self, seconds: float) -> tuple[None, None, dict[int, float]]:
        return None, None, {}

    def measure_costs(self, levels: Sequence[int], seconds: float, progress: Progress) -> Iterator[Curve]:
        """Curves for other batch sizes are measured, too, where time allows it: a batch becomes smaller at its end, and
        a server has larger ones."""
        self._notify("starting vLLM again, to time its passes")
        most = self.profile.vllm.max_num_seqs or max(levels)
        batches = [*levels, *(size for size in BATCHES if size <= most and size not in levels)]
        prompt_ms = self._prompt_ms()
        timed = self._timed(batches, levels, seconds, progress)
        for sequences, contexts, lines in by_batch(timed, CONTEXTS, LONGEST):
            intervals = tuple(tuple(median_interval(times) for times in line) for line in lines)
            rows, rounds = rows_of(sequences, LONGEST), min(len(times) for line in lines for times in line)
            yield Curve(sequences, contexts, rows, intervals, rounds, prompt_ms, change_ms=0.0)

    def _timed(
        self, batches: Sequence[int], needed: Sequence[int], seconds: float, progress: Progress
    ) -> list[TimedPass]:
        """Passes with 0 to LONGEST draft tokens per sequence."""
        return passes(
            self._model,
            self._timing_settings(),
            LONGEST,
            batches=batches,
            contexts=CONTEXTS,
            seconds=seconds,
            needed=needed,
            progress=progress,
        )

    def _timing_settings(self) -> dict[str, Any]:
        """The settings of an engine whose passes are timed."""
        memory = shared_memory(ENGINES, self.profile.vllm.gpu_memory_utilization)
        return engine_settings(plain(self.profile), "") | memory

    def _prompt_ms(self) -> float:
        """Milliseconds to prefill one token of a prompt that is not cached."""
        random = np.random.default_rng(0)
        times = []
        for _ in range(PROMPTS):
            prompt = random.integers(0, self._config.model_config.get_vocab_size(), PROMPT_TOKENS, dtype=np.int32)
            began = perf_counter()
            self._plain.generate_all([Request(prompt, 1)])
            times.append(1000 * (perf_counter() - began) / PROMPT_TOKENS)
        return median_interval(times).median

    def record(
        self,
        prompts: Sequence[IntArray],
        max_tokens: int,
        k: int,
        slots: int,
        done: Callable[[int, IntArray, IntArray], None],
    ) -> None:
        requests = [Request(prompt, max_tokens, Sampling(logprobs=k)) for prompt in prompts]
        answers, _ = self._plain.generate_all(requests)
        for index, answer in enumerate(answers):
            rows = [[token for token, _ in line.top[:k]] for line in answer.logprobs[1:]]
            done(index, int_array(answer.tokens), np.array(rows, dtype=np.int32).reshape(len(rows), k))

    def record_off_path_rows(self, answers: Sequence[Answer]) -> Iterator[OffPathRows | None]:
        """None for every answer: vLLM would have to prefill the complete text for each row."""
        yield from [None] * len(answers)

    def measure_expense(self, trace: Trace, methods: Sequence[ProposerSpec], level: int, seconds: float) -> Expense:
        """Drafting is timed in replays of the recorded answers, because it is the same code there. The cost of the step
        loop is included in the timed passes."""
        free = Costs(_FREE, Expense(), (_FREE,))
        clock = RealClock()
        timed: dict[str, TimedChains] = {}
        plan: list[tuple[int, float]] = []

        def wrap(proposer: ChainProposer, method: str) -> TimedChains:
            timed[method] = TimedChains(proposer, clock)
            return timed[method]

        for spec in methods:
            setting = Setting((spec,), PlannerSettings(max_nodes=LONGEST, trees=False))
            batch_replay = BatchReplay(setting, free, max_tokens=trace.about["max_tokens"], clock=clock, wrap=wrap)
            began = perf_counter()
            for group in grouped(trace.answers, level):
                batch_replay.run(group)
                if perf_counter() - began > seconds / len(methods):
                    break
            plan += [(sequences, ns / 1000) for sequences, ns in batch_replay.drafted]
        return Expense(
            propose={method: Line.through(chains.proposed) for method, chains in timed.items()},
            observe={method: Line.through(chains.observed) for method, chains in timed.items()},
            plan=Line.through(plan),
            topk=self._topk(),
        )

    def _topk(self) -> Line:
        """The cost of reading top ids; none on a GPU, where they are copied while it samples."""
        if self._config.device_config.device_type != "cpu":
            return Line()
        from specplug.engines.vllm.top_ids import time_reading

        return Line.through(time_reading(self._config.model_config.get_vocab_size()))

    def trace_drafter(
        self, spec: ProposerSpec, answers: Sequence[Answer], level: int, seconds: float, progress: Progress
    ) -> NoReturn:
        """EngineError: vLLM runs a drafter in steps of its own, in which nothing can be recorded."""
        raise EngineError("tune tries drafters on llama.cpp only")

    def arm(self, profile: Profile, *, slots: int, costs: Costs) -> Arm:
        if not profile.speculates:
            return VllmArm(profile.name, self._plain, Sampling())
        here = fingerprint.of(Path(self._model), engine=NAME, threads=None, gpu=True)
        learned = profile.measured.acceptance if profile.measured else {}
        profile = replace(profile, measured=Measured(here, None, learned, costs.batch))
        if not is_ours(profile):
            self._notify(f"starting vLLM with its own drafter, {profile.proposers[0].options['name']}")
            return _OwnArm(profile, self._model)
        return self._switched(profile)

    def idle_arm(self, *, slots: int, costs: Costs) -> Arm | None:
        """The drafting engine with drafting disabled; plain decoding has an engine of its own."""
        return self._switched(replace(plain(self.profile), measured=Measured(batch_curves=costs.batch)))

    def _switched(self, profile: Profile) -> SwitchedArm:
        return SwitchedArm(profile.name, self._drafting_engine(), write_profile(profile, self._folder), Sampling())

    def _drafting_engine(self) -> Vllm:
        if self._drafting is None:
            self._notify("starting vLLM with drafting")
            profile = self._profile_to_open()
            profile = replace(profile, vllm=replace(profile.vllm, num_speculative_tokens=LONGEST))
            self._drafting = self._open(profile, worker_extension_cls=SWITCH)
        return self._drafting

    def _profile_to_open(self) -> Profile:
        """A profile with which the drafting engine starts, before it switches to others."""
        return replace(self.profile, proposers=(ProposerSpec("ngram"),), planner=PlannerSettings(mode="static"))

    def close(self) -> None:
        self._stack.close()

    def _open(self, profile: Profile, **further: Any) -> Vllm:
        return self._stack.enter_context(
            open_vllm(self._model, profile, notify=self._notify, engines=ENGINES, **further)
        )


class _OwnArm(VllmArm):
    """An engine that only one profile uses."""

    def __init__(self, profile: Profile, model: str) -> None:
        self._stack = ExitStack()
        engine = self._stack.enter_context(open_vllm(model, profile, engines=ENGINES))
        super().__init__(profile.name, engine, Sampling())

    def close(self) -> None:
        self._stack.close()
