"""The stages of a tune. Each one takes its result from the journal, or does its work and adds the result to it.

This module reaches the engine only through a tuning subject, and does not depend on a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from specplug import registry
from specplug.bench.arms import Arm
from specplug.bench.workloads import categories
from specplug.engines.llama_cpp.settings_table import label
from specplug.errors import SpecplugError, UsageError
from specplug.generation.context_advice import context_advice
from specplug.machine import fingerprint, hardware
from specplug.planning.cost import CostCurve
from specplug.planning.request_time import SettingCosts
from specplug.profile import Measured, Runtime
from specplug.registry import ProposerSpec
from specplug.tune import trace as traces
from specplug.tune.budget import Budget
from specplug.tune.candidates import BUILTIN_METHOD, MAX_NODES, PLAIN, Setting
from specplug.tune.confirm import confirm
from specplug.tune.cost_curves import CONTEXTS, Curve
from specplug.tune.device_settings import builtin_settings, by_batch_size, with_lengths
from specplug.tune.drafter_stage import trace_drafters
from specplug.tune.drafter_trace import DrafterTrace
from specplug.tune.engine_choice import EngineChoice, choose_with_drafts, first_choice, with_setting
from specplug.tune.expense import Expense
from specplug.tune.journal import Journal
from specplug.tune.own_drafters import drafters_to_try
from specplug.tune.prediction import Costs, Prediction
from specplug.tune.recording import (
    known_trace,
    need_off_path_rows,
    prompts_to_record,
    record,
    record_off_path_rows,
    recorded_trace,
    trace_about,
    trace_path,
    trace_to_use,
)
from specplug.tune.replay import replay_all
from specplug.tune.selection import Pairs, select_finalists, select_winners
from specplug.tune.subject import Subject
from specplug.tune.trace import Trace
from specplug.tune.tune_request import SCHEMA, Request

AMPLE_CONTEXT = 4096
"""Tokens of context with which settings are confirmed, where the base profile has that many."""

SHORT_CONTEXT = 128
"""Tokens of the shorter of the two contexts at which engine settings are measured; the longer one is that of the
longest request."""

REPLAYED_TOKENS = 200
"""Answers that an earlier tune recorded are used, too, while replay has a second for this many tokens."""

OWN_PLANNER = "specplug's planner"

Progress = Callable[[str, float, str, float], None]
"""Receives the stage, the share of it that is done, the best setting so far, and the seconds that are left."""

Learned = Mapping[str, tuple[float, float]]
"""Acceptance counts by bucket."""


class Stages:
    """One run through the stages. Kinds and keys of journal entries must keep their names: `--resume` reads them."""

    def __init__(
        self,
        request: Request,
        subject: Subject,
        journal: Journal,
        budget: Budget,
        notify: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self.request = request
        self.subject = subject
        self.budget = budget
        self.notes: list[str] = []
        self.busy: str | None = None
        """How many cores other programs kept busy when the tune began, in words; None where few."""
        self._journal = journal
        self._notify = notify
        self._progress = progress
        self._best = ""
        self._drafters: Sequence[ProposerSpec] = request.drafters

    def begin(self) -> dict[str, Any]:
        """The fingerprint of the machine and of the model, as at the beginning of the tune."""
        if self._journal.entries:
            begun = self._journal.entries[0]
            self.busy = self.busy or begun.get("busy")
            if begun.get("planning", OWN_PLANNER) != self._planning:
                raise UsageError(
                    f"{self._journal.path}: this tune was begun where {begun.get('planning', OWN_PLANNER)} chooses the "
                    f"draft tokens, and now {self._planning} does; tune again without --resume"
                )
            return begun
        here = self.request.fingerprint()
        return self.add(
            "begun",
            busy=self.busy,
            planning=self._planning,
            schema=SCHEMA,
            request=self.request.identity(),
            fingerprint={**here, "read_gib_s": hardware.read_bandwidth()},
            sha256=fingerprint.sha256(self.request.model),
        )

    def fit_context(self) -> dict[str, list[int]]:
        """Set a context that all prompts and answers fit into; returns the tokens of every prompt, by category."""
        request, subject = self.request, self.subject
        context = subject.profile.runtime.context
        lengths: dict[str, list[int]] = {category: [] for category in categories(request.prompts)}
        longest = 0
        for prompt in request.prompts:
            length = sum(len(subject.encode([{"role": "user", "content": turn}])) for turn in prompt.turns)
            needed = length + len(prompt.turns) * request.max_tokens
            if needed > context:
                trained = 0 if subject.batched else subject.about()["train_context"]  # vLLM's is its limit
                raise UsageError(
                    f"{request.workload}: prompt {prompt.id} takes {needed} tokens with its answers, the context has "
                    f"{context}; {context_advice(needed, trained)}, or remove the prompt"
                )
            longest = max(longest, needed)
            lengths[prompt.category].append(length)
        # Small enough for several contexts at once. With one prompt at a time there is room for retained cells of
        # trees, as when the profile is used.
        ample = min(context, AMPLE_CONTEXT) if max(request.concurrency) == 1 else 0
        subject.use(context=max(ample, -(-longest // 256) * 256))
        return lengths

    def choose_threads(self) -> dict[str, Any]:
        """Choose the thread count by measuring, unless the base profile sets it, or other programs keep cores busy."""
        known = self._journal.last("threads")
        if known is None:
            own = self.subject.profile.runtime
            chosen, batch = own.threads, own.threads_batch or own.threads
            ms: dict[int, float] = {}
            if self.request.base.runtime.threads is None and hardware.usable_cores() > 1 and not self.busy:
                self._report("threads", 0.0)
                chosen, batch, ms = self.subject.choose_threads(self.budget.of("threads"))
                batch = own.threads_batch or batch
            ms_by_count = {str(count): value for count, value in ms.items()}
            known = self.add("threads", chosen=chosen, batch=batch, one_row_ms=ms_by_count)
        batch = known["batch"] if known["batch"] != known["chosen"] else None
        self.subject.use(threads=known["chosen"], threads_batch=batch)
        return {"chosen": known["chosen"], "batch": known["batch"], "one_row_ms": known["one_row_ms"]}

    def choose_engine_settings(self, lengths: Mapping[str, Sequence[int]]) -> EngineChoice | None:
        """Measure the engine settings that the base profile leaves open, and choose by plain decoding.

        None where there is nothing to choose. The subject then uses the setting for drafts.
        """
        known = self._journal.last("settings")
        request, subject = self.request, self.subject
        longest = max(map(max, lengths.values())) + request.max_tokens
        if known is None:
            contexts = sorted({min(SHORT_CONTEXT, longest), longest})
            seconds = self.budget.of("settings")
            table, stock, unmeasured = subject.measure_settings(
                contexts, max(request.concurrency), seconds, lambda share: self._report("settings", share)
            )
            entries = [{"runtime": asdict(one), "costs": costs.as_mapping()} for one, costs in table.items()]
            known = self.add("settings", stock=asdict(stock), table=entries, unmeasured=unmeasured)
        for text in known.get("unmeasured", ()):  # journals of earlier versions have none
            self.note(text)
        table = {Runtime(**entry["runtime"]): SettingCosts.from_mapping(entry["costs"]) for entry in known["table"]}
        if not table:
            return None
        requests = [(length, request.max_tokens) for category in lengths.values() for length in category]
        choice = first_choice(
            table,
            Runtime(**known["stock"]),
            requests,
            base=request.base.runtime,
            sequences=max(request.concurrency),
            allow_rounding=request.allow_rounding,
        )
        subject.use_setting(choice.drafting)
        return choice

    def choose_with_drafts(self, choice: EngineChoice | None, trace: Trace, expense: Expense) -> EngineChoice | None:
        """Choose again by what drafting gains under each setting; for one sequence at a time."""
        request = self.request
        if choice is None or max(request.concurrency) > 1:
            return choice
        chosen = choose_with_drafts(
            choice,
            trace,
            expense,
            self._methods(),
            base=request.base.runtime,
            allow_rounding=request.allow_rounding,
        )
        self.subject.use_setting(chosen.drafting)
        if not chosen.equal:
            why = "as allowed" if request.allow_rounding else "under every setting that was measured"
            self.note(f"passes with drafts round differently from plain decoding, {why}: answers can differ at ties")
        elif chosen.nodes < max(MAX_NODES):
            self.note(
                f"passes of up to {chosen.nodes + 1} rows round as plain decoding does, so drafts have {chosen.nodes} "
                "tokens at most; --allow-rounding lifts that"
            )
        return chosen

    def measure_costs(self, choice: EngineChoice | None = None) -> list[Curve]:
        """Measure T(rows, context) for every concurrency, and for others that the engine needs, under the setting for
        drafts."""
        setting = label(choice.drafting) if choice is not None else ""
        known = {
            entry["curve"]["sequences"]: Curve.from_mapping(entry["curve"])
            for entry in self._journal.of("cost")
            if entry["setting"] == setting
        }
        open_ = [level for level in self.request.concurrency if level not in known]
        if open_:
            seconds = self.budget.of("cost")
            for curve in self.subject.measure_costs(open_, seconds, lambda share: self._report("cost", share)):
                known[curve.sequences] = curve
                self.add("cost", setting=setting, curve=curve.as_mapping())
        for level, curve in sorted(known.items()):
            for text in curve.notes:
                self.note(f"cost with {level} at once: {text}")
        for level in self.request.concurrency:
            if level not in known:
                raise UsageError(
                    f"passes with {level} at once could not be timed: lower --concurrency, or give the engine memory"
                )
        return [curve for _, curve in sorted(known.items())]

    def record(self, lengths: Mapping[str, Sequence[int]], curves: Sequence[Curve]) -> tuple[Trace, Path]:
        """Record the target's answers, taking turns between categories; returns the trace and a file that holds it."""
        own = self._journal.path.with_suffix(".npz")
        known = self._journal.last("record")
        if known is not None:
            return recorded_trace(own, known["checksum"]), own
        request, curve = self.request, curves[0]
        row_ms = CostCurve(curve.points.contexts, curve.points.rows, curve.points.ms).at(CONTEXTS[0])
        seconds = self.budget.of("record")
        prompts, tokens = prompts_to_record(
            self.subject, request, lengths, seconds, prompt_ms=curve.prompt_ms, row_ms=row_ms
        )
        if tokens < request.max_tokens:
            self.note(f"answers have {tokens} tokens instead of {request.max_tokens}: the budget allows no more")
        if len(prompts) < len(request.prompts):
            self.note(f"{len(prompts)} of {len(request.prompts)} prompts are recorded: the budget allows no more")
        about = self._trace_about(tokens)
        path = trace_path(about)
        trace = record(
            self.subject,
            known_trace(path, about, self._notify),
            prompts,
            path,
            seconds=seconds,
            progress=lambda share: self._report("record", share),
        )
        readers = any(one.requires.topk for one in registry.build_sources(self._methods()))
        if readers and need_off_path_rows(row_ms):
            trace = record_off_path_rows(
                self.subject,
                trace,
                path,
                seconds=self.budget.of("off_path_rows"),
                progress=lambda share: self._report("off_path_rows", share),
            )
        trace, others = trace_to_use(trace, prompts, self.budget.of("replay") * REPLAYED_TOKENS)
        if others:
            self.note(f"{others} answers that an earlier tune recorded are used, too")
        if not trace.num_tokens:
            raise UsageError(f"{request.workload}: the model answers no prompt with more than one token; change them")
        self.add("record", checksum=traces.save(trace, own), answers=len(trace.answers), tokens=trace.num_tokens)
        return trace, own

    def measure_expense(self, trace: Trace) -> Expense:
        """Measure the cost of drafting beside the target's passes."""
        known = self._journal.last("expense")
        if known is None:
            self._report("expense", 0.0)
            seconds = self.budget.of("expense")
            found = self.subject.measure_expense(trace, self._methods(), self.request.level, seconds)
            known = self.add("expense", expense=found.as_mapping())
        return Expense.from_mapping(known["expense"])

    def trace_drafters(self, trace: Trace) -> dict[str, DrafterTrace]:
        """Run every drafter over the recorded answers. The journal does not keep this: a continued tune repeats it."""
        context = self.subject.profile.runtime.context
        named, own = self.request.drafters, self.subject.own_drafters
        self._drafters, notes = drafters_to_try(named, own, trace.answers, context)
        for note in notes:
            self.note(note)
        seconds = self.budget.of("drafters") if self._drafters else 0.0
        return trace_drafters(
            self.subject,
            self._drafters,
            trace,
            self.request.level,
            seconds,
            report=lambda share: self._report("drafters", share),
            note=self.note,
        )

    def replay(self, path: Path, costs: Costs, most_nodes: int) -> dict[Setting, Prediction]:
        """Replay every setting over the trace, while time allows. Replays are quick, so the journal does not keep them:
        a continued tune repeats them."""
        most_nodes = min(most_nodes, costs.points.rows[-1] - costs.points.sequences)
        combined = self._journal.last("combined")
        if combined is not None:
            specs = {spec.method: spec for spec in self._methods()}
            settings = [
                with_lengths([specs[method] for method in one["methods"]], one["lengths"])
                for one in combined["settings"]
            ]
            return self._replayed([*settings, *builtin_settings(most_nodes)], path, costs, None)
        settings = self.subject.settings_to_try(most_nodes, (*self._drafters, *self.request.retrieval))
        known = self._journal.last("finalists")
        seconds = self.budget.of("replay")
        if known is not None:
            settings.sort(key=lambda setting: setting.name not in known["names"])
            seconds = self.budget.share("replay")
        predicted = self._replayed(settings, path, costs, seconds)
        if len(predicted) < len(settings):
            self.note(f"{len(predicted)} of {len(settings)} settings were replayed: the budget allows no more")
        if self.subject.engine_planning != "batch_size":
            return predicted
        settings = by_batch_size(predicted, costs.batch)
        as_plain = [
            {"methods": [spec.method for spec in one.proposers], "lengths": list(one.lengths)} for one in settings
        ]
        self.add("combined", settings=as_plain)
        own = self._replayed(settings, path, costs, None)
        return own | {setting: one for setting, one in predicted.items() if not setting.lengths}

    def _replayed(
        self, settings: Sequence[Setting], path: Path, costs: Costs, seconds: float | None
    ) -> dict[Setting, Prediction]:
        """The predictions in the order of the settings, without those for which no time was left."""
        predicted: dict[Setting, Prediction] = {}
        for setting, prediction in replay_all(settings, path, costs, seconds=seconds):
            predicted[setting] = prediction
            best = max(predicted, key=lambda one: predicted[one].total.speedup)
            self._best = f"{best.name} {predicted[best].total.speedup:.2f} predicted"
            self._report("replay", len(predicted) / len(settings))
        return {setting: predicted[setting] for setting in settings if setting in predicted}

    def select_finalists(self, predicted: Mapping[Setting, Prediction]) -> list[Setting]:
        """Select the settings to confirm; a continued tune keeps those that were selected before."""
        known = self._journal.last("finalists")
        if known is not None:
            return [setting for setting in predicted if setting.name in known["names"]]
        selected = select_finalists({setting: one.total.speedup for setting, one in predicted.items()})
        self.add("finalists", names=[setting.name for setting in selected])
        return selected

    def confirm(
        self,
        trace: Trace,
        learned: Mapping[Setting, Learned],
        costs: Costs,
        parts: int,
        choice: EngineChoice | None = None,
    ) -> dict[Setting, Pairs]:
        """Run these settings and plain decoding live, for one of `parts` equal parts of the time that is left.

        Plain decoding runs under the engine settings that are fastest for it.
        """
        level = costs.points.sequences
        until = self.budget.spent + self.budget.left / parts

        def progress(pairs: Mapping[Setting, Pairs]) -> None:
            found = {setting: line.speedup() for setting, line in pairs.items()}
            speeds = {setting: interval.median for setting, interval in found.items() if interval is not None}
            if speeds:
                best = max(speeds, key=speeds.__getitem__)
                self._best = f"{best.name} {speeds[best]:.2f}"
            self._report("confirm", min(1.0, self.budget.spent / self.budget.seconds))

        with ExitStack() as stack:
            arms: dict[Setting, Arm] = {}
            for setting in (PLAIN, *learned):
                profile = setting.profile(self.subject.profile, "none" if setting == PLAIN else "candidate")
                profile = replace(profile, measured=Measured(acceptance=learned.get(setting, {})))
                if setting == PLAIN and choice is not None:
                    profile = replace(profile, runtime=with_setting(profile.runtime, choice.plain))
                arms[setting] = self.subject.arm(profile, slots=level, costs=costs)
                stack.callback(arms[setting].close)
            drafts = any(setting.method != BUILTIN_METHOD for setting in learned)
            idle = self.subject.idle_arm(slots=level, costs=costs) if drafts else None
            if idle is not None:
                stack.callback(idle.close)
            return confirm(
                arms,
                trace,
                level,
                left=lambda: until - self.budget.spent,
                idle=idle,
                earlier=[entry["seen"] for entry in self._journal.of("pair") if entry["level"] == level],
                store=lambda measured: self.add("pair", level=level, seen=measured),
                progress=progress,
            )

    def select_winner(
        self,
        trace: Trace,
        learned: Mapping[Setting, Learned],
        costs: Mapping[int, Costs],
        confirmed: dict[int, dict[Setting, Pairs]],
        choice: EngineChoice | None = None,
    ) -> tuple[Setting | None, dict[str, str]]:
        """Select the fastest setting that is not slower at another concurrency; and why others are rejected.

        Measurements at the other concurrencies are added to `confirmed`.
        """
        pairs_of = confirmed[self.request.level]
        idle = next((interval for pairs in pairs_of.values() if (interval := pairs.idle_speedup()) is not None), None)
        if idle is not None:
            self.note(
                f"the drafting engine ran {idle.median:.2f} ({idle.low:.2f}-{idle.high:.2f}) times as fast as plain "
                "decoding with drafting disabled: a setting has to be faster than both"
            )
        rejected = {
            setting.name: why for setting, pairs in pairs_of.items() if (why := pairs.why_rejected()) is not None
        }
        if choice is not None:
            for setting, pairs in pairs_of.items():
                speedup = pairs.speedup()
                if speedup is not None and setting.name not in rejected and not choice.pays(speedup.median):
                    rejected[setting.name] = "slower in whole requests: prompts take longer under its engine settings"
        others = [level for level in self.request.concurrency if level != self.request.level]
        for setting in select_winners(pairs_of):
            if setting.name in rejected:
                continue
            for place, level in enumerate(others):
                only = {setting: learned[setting]}
                found = self.confirm(trace, only, costs[level], len(others) - place, choice)[setting]
                confirmed.setdefault(level, {})[setting] = found
                if found.speedup() is None:
                    self.note(f"{setting.name}: no time was left to measure it with {level} at once")
                elif found.is_slower():
                    rejected[setting.name] = f"slower with {level} at once"
                    break
            if setting.name not in rejected:
                return setting, rejected
        return None, rejected

    def check_model(self, begun: Mapping[str, Any]) -> None:
        """SpecplugError when the model file has changed, or is missing, since the tune began."""
        now = {"model": fingerprint.model_identity(self.request.model)}
        if fingerprint.changes({"model": begun["fingerprint"]["model"]}, now):
            raise SpecplugError(f"{self.request.model}: changed while it was tuned; nothing was written, tune again")

    def add(self, kind: str, **values: Any) -> dict[str, Any]:
        """Add an entry to the journal, with the time spent so far."""
        return self._journal.add(kind, spent=round(self.budget.spent, 3), **values)

    def note(self, text: str) -> None:
        """Notify the user now, and keep the text for the report."""
        self.notes.append(text)
        self._notify(text)

    def _report(self, stage: str, share: float) -> None:
        self._progress(stage, share, self._best, self.budget.left)

    @property
    def _planning(self) -> str:
        """What chooses the draft tokens to verify, in words."""
        words = {None: OWN_PLANNER, "adaptive": "vLLM's adaptive verification", "batch_size": "the batch size"}
        return words[self.subject.engine_planning]

    def _methods(self) -> list[ProposerSpec]:
        """One setting of each method in the grid, without the engine's own drafters and models that draft."""
        settings = self.subject.settings_to_try(1, self.request.retrieval)
        specs = {spec.method: spec for setting in reversed(settings) for spec in setting.proposers}
        return [spec for method, spec in specs.items() if method != BUILTIN_METHOD]

    def _trace_about(self, max_tokens: int) -> dict[str, Any]:
        """The key of the trace of this tune."""
        here = self._journal.entries[0]["fingerprint"]
        profile, batched = self.subject.profile, self.subject.batched
        return trace_about(here, profile, self.request.prompts, max_tokens, batched=batched)
