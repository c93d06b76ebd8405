"""The stages of a tune that measure: context, threads, engine settings, costs, plain answers and drafters.

Each one takes its result from the journal, or does its work and adds the result to it. This module reaches the engine
only through a tuning subject, and does not depend on a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specplug import registry
from specplug.bench.workloads import categories
from specplug.engines.llama_cpp.settings_table import label
from specplug.errors import UsageError
from specplug.generation.context_advice import context_advice
from specplug.machine import fingerprint, hardware
from specplug.planning.cost import CostCurve
from specplug.planning.request_time import SettingCosts
from specplug.profile import Runtime
from specplug.tune import trace as traces
from specplug.tune.candidates import MAX_NODES
from specplug.tune.cost_curves import CONTEXTS, Curve
from specplug.tune.drafter_stage import trace_drafters
from specplug.tune.drafter_trace import DrafterTrace
from specplug.tune.engine_choice import EngineChoice, choose_with_drafts, first_choice
from specplug.tune.expense import Expense
from specplug.tune.own_drafters import drafters_to_try
from specplug.tune.recording import (
    known_trace,
    need_off_path_rows,
    prompts_to_record,
    record,
    record_off_path_rows,
    recorded_trace,
    trace_path,
    trace_to_use,
)
from specplug.tune.trace import Trace
from specplug.tune.tune_request import SCHEMA
from specplug.tune.tune_run import OWN_PLANNER, TuneRun

AMPLE_CONTEXT = 4096
"""Tokens of context with which settings are confirmed, where the base profile has that many."""

SHORT_CONTEXT = 128
"""Tokens of the shorter of the two contexts at which engine settings are measured; the longer one is that of the
longest request."""

REPLAYED_TOKENS = 200
"""Answers that an earlier tune recorded are used, too, while replay has a second for this many tokens."""


class MeasuringStages:
    """The measurements. Kinds and keys of journal entries must keep their names: `--resume` reads them."""

    def __init__(self, run: TuneRun) -> None:
        self.run = run

    def begin(self) -> dict[str, Any]:
        """The fingerprint of the machine and of the model, as at the beginning of the tune."""
        if self.run.journal.entries:
            begun = self.run.journal.entries[0]
            self.run.busy = self.run.busy or begun.get("busy")
            if begun.get("planning", OWN_PLANNER) != self.run.planning:
                raise UsageError(
                    f"{self.run.journal.path}: this tune was begun where {begun.get('planning', OWN_PLANNER)} "
                    f"chooses the draft tokens, and now {self.run.planning} does; tune again without --resume"
                )
            return begun
        here = self.run.request.fingerprint()
        return self.run.add(
            "begun",
            busy=self.run.busy,
            planning=self.run.planning,
            schema=SCHEMA,
            request=self.run.request.identity(),
            fingerprint={**here, "read_gib_s": hardware.read_bandwidth()},
            sha256=fingerprint.sha256(self.run.request.model),
        )

    def fit_context(self) -> dict[str, list[int]]:
        """Set a context that all prompts and answers fit into; returns the tokens of every prompt, by category."""
        request, subject = self.run.request, self.run.subject
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
        known = self.run.journal.last("threads")
        if known is None:
            own = self.run.subject.profile.runtime
            chosen, batch = own.threads, own.threads_batch or own.threads
            ms: dict[int, float] = {}
            if self.run.request.base.runtime.threads is None and hardware.usable_cores() > 1 and not self.run.busy:
                self.run.report("threads", 0.0)
                chosen, batch, ms = self.run.subject.choose_threads(self.run.budget.of("threads"))
                batch = own.threads_batch or batch
            ms_by_count = {str(count): value for count, value in ms.items()}
            known = self.run.add("threads", chosen=chosen, batch=batch, one_row_ms=ms_by_count)
        batch = known["batch"] if known["batch"] != known["chosen"] else None
        self.run.subject.use(threads=known["chosen"], threads_batch=batch)
        return {"chosen": known["chosen"], "batch": known["batch"], "one_row_ms": known["one_row_ms"]}

    def choose_engine_settings(self, lengths: Mapping[str, Sequence[int]]) -> EngineChoice | None:
        """Measure the engine settings that the base profile leaves open, and choose by plain decoding.

        None where there is nothing to choose. The subject then uses the setting for drafts.
        """
        known = self.run.journal.last("settings")
        request, subject = self.run.request, self.run.subject
        longest = max(map(max, lengths.values())) + request.max_tokens
        if known is None:
            contexts = sorted({min(SHORT_CONTEXT, longest), longest})
            seconds = self.run.budget.of("settings")
            table, stock, unmeasured = subject.measure_settings(
                contexts, max(request.concurrency), seconds, lambda share: self.run.report("settings", share)
            )
            entries = [{"runtime": asdict(one), "costs": costs.as_mapping()} for one, costs in table.items()]
            known = self.run.add("settings", stock=asdict(stock), table=entries, unmeasured=unmeasured)
        for text in known.get("unmeasured", ()):  # journals of earlier versions have none
            self.run.note(text)
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
        request = self.run.request
        if choice is None or max(request.concurrency) > 1:
            return choice
        chosen = choose_with_drafts(
            choice,
            trace,
            expense,
            self.run.methods(),
            base=request.base.runtime,
            allow_rounding=request.allow_rounding,
        )
        self.run.subject.use_setting(chosen.drafting)
        if not chosen.equal:
            why = "as allowed" if request.allow_rounding else "under every setting that was measured"
            self.run.note(
                f"passes with drafts round differently from plain decoding, {why}: answers can differ at ties"
            )
        elif chosen.nodes < max(MAX_NODES):
            self.run.note(
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
            for entry in self.run.journal.of("cost")
            if entry["setting"] == setting
        }
        open_ = [level for level in self.run.request.concurrency if level not in known]
        if open_:
            seconds = self.run.budget.of("cost")
            for curve in self.run.subject.measure_costs(open_, seconds, lambda share: self.run.report("cost", share)):
                known[curve.sequences] = curve
                self.run.add("cost", setting=setting, curve=curve.as_mapping())
        for level, curve in sorted(known.items()):
            for text in curve.notes:
                self.run.note(f"cost with {level} at once: {text}")
        for level in self.run.request.concurrency:
            if level not in known:
                raise UsageError(
                    f"passes with {level} at once could not be timed: lower --concurrency, or give the engine memory"
                )
        return [curve for _, curve in sorted(known.items())]

    def record(self, lengths: Mapping[str, Sequence[int]], curves: Sequence[Curve]) -> tuple[Trace, Path]:
        """Record the target's answers, taking turns between categories; returns the trace and a file that holds it."""
        own = self.run.journal.path.with_suffix(".npz")
        known = self.run.journal.last("record")
        if known is not None:
            return recorded_trace(own, known["checksum"]), own
        request, curve = self.run.request, curves[0]
        row_ms = CostCurve(curve.points.contexts, curve.points.rows, curve.points.ms).at(CONTEXTS[0])
        seconds = self.run.budget.of("record")
        prompts, tokens = prompts_to_record(
            self.run.subject, request, lengths, seconds, prompt_ms=curve.prompt_ms, row_ms=row_ms
        )
        if tokens < request.max_tokens:
            self.run.note(f"answers have {tokens} tokens instead of {request.max_tokens}: the budget allows no more")
        if len(prompts) < len(request.prompts):
            self.run.note(f"{len(prompts)} of {len(request.prompts)} prompts are recorded: the budget allows no more")
        about = self.run.trace_about(tokens)
        path = trace_path(about)
        trace = record(
            self.run.subject,
            known_trace(path, about, self.run.notify),
            prompts,
            path,
            seconds=seconds,
            progress=lambda share: self.run.report("record", share),
        )
        readers = any(one.requires.topk for one in registry.build_sources(self.run.methods()))
        if readers and need_off_path_rows(row_ms):
            trace = record_off_path_rows(
                self.run.subject,
                trace,
                path,
                seconds=self.run.budget.of("off_path_rows"),
                progress=lambda share: self.run.report("off_path_rows", share),
            )
        trace, others = trace_to_use(trace, prompts, self.run.budget.of("replay") * REPLAYED_TOKENS)
        if others:
            self.run.note(f"{others} answers that an earlier tune recorded are used, too")
        if not trace.num_tokens:
            raise UsageError(f"{request.workload}: the model answers no prompt with more than one token; change them")
        self.run.add("record", checksum=traces.save(trace, own), answers=len(trace.answers), tokens=trace.num_tokens)
        return trace, own

    def measure_expense(self, trace: Trace) -> Expense:
        """Measure the cost of drafting beside the target's passes."""
        known = self.run.journal.last("expense")
        if known is None:
            self.run.report("expense", 0.0)
            seconds = self.run.budget.of("expense")
            found = self.run.subject.measure_expense(trace, self.run.methods(), self.run.request.level, seconds)
            known = self.run.add("expense", expense=found.as_mapping())
        return Expense.from_mapping(known["expense"])

    def trace_drafters(self, trace: Trace) -> dict[str, DrafterTrace]:
        """Run every drafter over the recorded answers. The journal does not keep this: a continued tune repeats it."""
        context = self.run.subject.profile.runtime.context
        named, own = self.run.request.drafters, self.run.subject.own_drafters
        self.run.drafters, notes = drafters_to_try(named, own, trace.answers, context)
        for note in notes:
            self.run.note(note)
        seconds = self.run.budget.of("drafters") if self.run.drafters else 0.0
        return trace_drafters(
            self.run.subject,
            self.run.drafters,
            trace,
            self.run.request.level,
            seconds,
            report=lambda share: self.run.report("drafters", share),
            note=self.run.note,
        )
