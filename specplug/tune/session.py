"""A whole tune: fingerprint, cost, record, replay, confirm, write. Every step is in the journal before the next.

Knows the order of things. Knows no engine inside, and no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from specplug import profile as profiles
from specplug import registry
from specplug.bench.arms import Arm
from specplug.bench.workloads import categories
from specplug.errors import SpecplugError, UsageError
from specplug.machine import fingerprint, hardware
from specplug.planning.cost import CostCurve
from specplug.profile import CostPoints, Measured, Profile
from specplug.registry import ProposerSpec
from specplug.tune import journal as journals
from specplug.tune import trace as traces
from specplug.tune.budget import Budget
from specplug.tune.candidates import PLAIN, Setting, grid
from specplug.tune.confirm import confirm
from specplug.tune.cost_curves import CONTEXTS, Curve
from specplug.tune.document import Findings, document, tuned_profile
from specplug.tune.expense import Expense
from specplug.tune.journal import Journal
from specplug.tune.prediction import Costs, Prediction
from specplug.tune.recording import (
    known_trace,
    off_path_rows_matter,
    prompts_to_record,
    record,
    record_off_path_rows,
    recorded,
    trace_about,
    trace_path,
    trace_to_use,
)
from specplug.tune.replay import replay, replay_all
from specplug.tune.selection import Pairs, candidates, winners
from specplug.tune.subject import Subject
from specplug.tune.trace import Trace
from specplug.tune.tune_request import SCHEMA, Request, check, check_journal, journal_path

AMPLE_CONTEXT = 4096
"""Tokens of context with which settings are confirmed, where the base profile has as many."""

REPLAYED_TOKENS = 200
"""Answers recorded by an earlier tune are used, too, as long as they leave replay so many tokens per second."""

Progress = Callable[[str, float, str, float], None]
"""Told the stage, the share of it that is done, what is best so far, and the seconds that are left."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The profile as written, and the document of `tune --json`."""

    profile: Profile
    document: dict[str, Any]


def tune(
    request: Request,
    *,
    notify: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda stage, share, best, left: None,
    opener: Callable[[Request], Subject] | None = None,
    clock: Callable[[], float] = monotonic,
) -> Outcome:
    """Find and write the profile. Interrupted, it can be continued with `resume`. `opener` opens another engine.

    UsageError for what cannot be tuned, and for a journal that belongs to something else; the profile is written last,
    whole or not at all.
    """
    check(request)
    with ExitStack() as stack:
        journal = stack.enter_context(journals.opened(journal_path(request.out), resume=request.resume))
        if journal.torn:
            notify("the journal's last line was half written; that step is done again")
        if journal.drops_unfinished:
            notify("an unfinished tune of this profile is dropped; --resume would have continued it")
        if journal.entries:
            check_journal(journal, request)
        budget = Budget(request.budget, journal.entries[-1]["spent"] if journal.entries else 0.0, clock)
        busy = hardware.busy_warning()  # before an engine is
        subject = opener(request) if opener else open_subject(request, notify)
        stack.callback(subject.close)
        session = _Session(request, subject, journal, budget, notify, progress)
        if busy:
            session.note(busy)
        outcome = session.run()
        profiles.save(outcome.profile, request.out)
        session.add("done", path=str(request.out))
    return outcome


def open_subject(request: Request, notify: Callable[[str], None]) -> Subject:
    """The engine of the base profile with the model in it."""
    if request.base.engine == "vllm":
        from specplug.tune.vllm import VllmSubject

        return VllmSubject(str(request.model), request.base, most=max(request.concurrency), notify=notify)
    from specplug.tune.llama_cpp import LlamaCppSubject

    return LlamaCppSubject(request.model, request.base)


class _Session:
    """One run through the stages; each looks into the journal first."""

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
        self.journal = journal
        self.budget = budget
        self.notify = notify
        self.progress = progress
        self.notes: list[str] = []
        self.best = ""

    def run(self) -> Outcome:
        begun = self.begin()
        lengths = self.fit()
        threads = self.threads()
        curves = self.cost()
        trace, path = self.record(lengths, curves)
        expense = self.expense(trace)
        level = self.request.level
        padded, most_nodes = self.subject.limits(level)
        points = {curve.sequences: curve.points for curve in curves}
        batch = tuple(points.values()) if self.subject.batched else ()
        live = {
            level: Costs(points[level], expense, batch, self.request.base.vllm.uniform)
            for level in self.request.concurrency
        }
        costs = replace(live[level], points=_padded(points[level])) if padded else live[level]
        predicted = self.replay(path, costs, most_nodes)
        finalists = self.finalists(predicted)
        learned = {setting: predicted[setting].learned for setting in finalists}
        for setting in finalists:  # what is confirmed is what will be written, which knows what was learned here
            predicted[setting] = replay(setting, trace, costs, learned=learned[setting])
        predicted[PLAIN] = replay(PLAIN, trace, costs)
        confirmed = {level: self.confirm(trace, learned, live[level], len(self.request.concurrency))}
        chosen, rejected = self.choose(trace, learned, live, confirmed)
        self.same_model(begun)
        found = Findings(
            request=self.request,
            fingerprint={**begun["fingerprint"], "threads": threads["chosen"]},
            batched=self.subject.batched,
            model={**self.subject.about(), "sha256": begun["sha256"]},
            trace=trace,
            threads=threads,
            curves=curves,
            expense=expense,
            predicted=predicted,
            confirmed=confirmed,
            chosen=chosen or PLAIN,
            rejected=rejected,
            seconds=self.budget.spent,
            notes=self.notes,
        )
        whole = document(found)
        return Outcome(tuned_profile(found, whole, learned.get(found.chosen, {})), whole)

    # -- stages ---------------------------------------------------------------------------------------------------

    def begin(self) -> dict[str, Any]:
        """The machine and the model as they are now."""
        if self.journal.entries:
            return self.journal.entries[0]
        here = self.request.fingerprint()
        return self.add(
            "begun",
            schema=SCHEMA,
            request=self.request.identity(),
            fingerprint={**here, "read_gib_s": hardware.read_bandwidth()},
            sha256=fingerprint.sha256(self.request.model),
        )

    def fit(self) -> dict[str, list[int]]:
        """Prompt tokens of every prompt, by category; gives the engine a context that all fit in."""
        request, subject = self.request, self.subject
        context = subject.profile.runtime.context
        lengths: dict[str, list[int]] = {kind: [] for kind in categories(request.prompts)}
        longest = 0
        for prompt in request.prompts:
            length = sum(len(subject.encode([{"role": "user", "content": turn}])) for turn in prompt.turns)
            needed = length + len(prompt.turns) * request.max_tokens
            if needed > context:
                how = f"raise {'vllm: max_model_len' if subject.batched else 'runtime: context'}"
                raise UsageError(
                    f"{request.workload}: prompt {prompt.id} takes {needed} tokens with its answers, the context "
                    f"{context}; {how}, or drop the prompt"
                )
            longest = max(longest, needed)
            lengths[prompt.category].append(length)
        # Small enough for several contexts at once; alone, with the cells that trees may keep when it runs.
        ample = min(context, AMPLE_CONTEXT) if max(request.concurrency) == 1 else 0
        subject.use(context=max(ample, -(-longest // 256) * 256))
        return lengths

    def threads(self) -> dict[str, Any]:
        """Chosen by measuring, unless somebody said how many."""
        known = self.journal.last("threads")
        if known is None:
            chosen = self.subject.profile.runtime.threads
            ms: dict[int, float] = {}
            if self.request.base.runtime.threads is None and hardware.usable_cores() > 1:
                self.tell("threads", 0.0)
                chosen, ms = self.subject.choose_threads(self.budget.of("threads"))
            known = self.add("threads", chosen=chosen, one_row_ms={str(count): value for count, value in ms.items()})
        self.subject.use(threads=known["chosen"])
        return {"chosen": known["chosen"], "one_row_ms": known["one_row_ms"]}

    def cost(self) -> list[Curve]:
        """T(rows, context) for every concurrency, and for others that the engine needs."""
        known = {entry["curve"]["sequences"]: Curve.from_mapping(entry["curve"]) for entry in self.journal.of("cost")}
        open_ = [level for level in self.request.concurrency if level not in known]
        if open_:
            seconds = self.budget.of("cost")
            for curve in self.subject.curves(open_, seconds, lambda share: self.tell("cost", share)):
                known[curve.sequences] = curve
                self.add("cost", curve=curve.as_mapping())
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
        """The target's own answers, in turn by category, and the file that holds just these."""
        own = self.journal.path.with_suffix(".npz")
        known = self.journal.last("record")
        if known is not None:
            return recorded(own, known["checksum"]), own
        curve = curves[0]
        row_ms = CostCurve(curve.points.contexts, curve.points.rows, curve.points.ms).at(CONTEXTS[0])
        seconds = self.budget.of("record")
        prompts, tokens = prompts_to_record(
            self.subject, self.request, lengths, seconds, prompt_ms=curve.prompt_ms, row_ms=row_ms
        )
        if tokens < self.request.max_tokens:
            self.note(f"answers of {tokens} tokens instead of {self.request.max_tokens}: the budget allows no more")
        if len(prompts) < len(self.request.prompts):
            few = f"{len(prompts)} of {len(self.request.prompts)}"
            self.note(f"{few} prompts are recorded: the budget allows no more")
        about = self.about(tokens)
        path = trace_path(about)
        trace = record(
            self.subject,
            known_trace(path, about, self.notify),
            prompts,
            path,
            seconds=seconds,
            progress=lambda share: self.tell("record", share),
        )
        readers = any(one.requires.topk for one in registry.build_sources([ProposerSpec(m) for m in self.methods()]))
        if readers and off_path_rows_matter(row_ms):
            trace = record_off_path_rows(
                self.subject,
                trace,
                path,
                seconds=self.budget.of("off_path_rows"),
                progress=lambda share: self.tell("off_path_rows", share),
            )
        trace, further = trace_to_use(trace, prompts, room=self.budget.of("replay") * REPLAYED_TOKENS)
        if further:
            self.note(f"{further} answers that were recorded before are used, too")
        if not trace.num_tokens:
            raise UsageError(f"{self.request.workload}: the model answers nothing at all; give it other prompts")
        self.add("record", checksum=traces.save(trace, own), answers=len(trace.answers), tokens=trace.num_tokens)
        return trace, own

    def expense(self, trace: Trace) -> Expense:
        """What drafting itself costs here."""
        known = self.journal.last("expense")
        if known is None:
            self.tell("expense", 0.0)
            found = self.subject.expense(trace, self.methods(), self.request.level, self.budget.of("expense"))
            known = self.add("expense", expense=found.as_mapping())
        return Expense.from_mapping(known["expense"])

    def replay(self, path: Path, costs: Costs, most_nodes: int) -> dict[Setting, Prediction]:
        """Every setting over the trace, as far as time allows; done again where a tune goes on, since it is cheap."""
        most_nodes = min(most_nodes, costs.points.rows[-1] - costs.points.sequences)
        settings = grid(self.subject.provides, trees=self.subject.trees, most_nodes=most_nodes)
        known = self.journal.last("finalists")
        seconds = self.budget.of("replay")
        if known is not None:
            settings.sort(key=lambda setting: setting.name not in known["names"])
            seconds = self.budget.share("replay")
        predicted: dict[Setting, Prediction] = {}
        for setting, prediction in replay_all(settings, path, costs, seconds=seconds):
            predicted[setting] = prediction
            best = max(predicted, key=lambda one: predicted[one].total.speedup)
            self.best = f"{best.name} {predicted[best].total.speedup:.2f} predicted"
            self.tell("replay", len(predicted) / len(settings))
        if len(predicted) < len(settings):
            self.note(f"{len(predicted)} of {len(settings)} settings were replayed: the budget allows no more")
        return {setting: predicted[setting] for setting in settings if setting in predicted}

    def finalists(self, predicted: Mapping[Setting, Prediction]) -> list[Setting]:
        """Those to confirm; the same ones where a tune goes on."""
        known = self.journal.last("finalists")
        if known is not None:
            return [setting for setting in predicted if setting.name in known["names"]]
        chosen = candidates({setting: one.total.speedup for setting, one in predicted.items()})
        self.add("finalists", names=[setting.name for setting in chosen])
        return chosen

    def confirm(
        self, trace: Trace, learned: Mapping[Setting, Mapping[str, tuple[float, float]]], costs: Costs, parts: int
    ) -> dict[Setting, Pairs]:
        """These settings and plain decoding, live, for one of so many equal parts of the time that is left."""
        level = costs.points.sequences
        until = self.budget.spent + self.budget.left / parts

        def progress(pairs: Mapping[Setting, Pairs]) -> None:
            found = {setting: line.speedup() for setting, line in pairs.items()}
            speeds = {setting: interval.median for setting, interval in found.items() if interval is not None}
            if speeds:
                best = max(speeds, key=speeds.__getitem__)
                self.best = f"{best.name} {speeds[best]:.2f}"
            self.tell("confirm", min(1.0, self.budget.spent / self.budget.seconds))

        with ExitStack() as stack:
            arms: dict[Setting, Arm] = {}
            for setting in (PLAIN, *learned):
                profile = setting.profile(self.subject.profile, "none" if setting == PLAIN else "candidate")
                profile = replace(profile, measured=Measured(acceptance=learned.get(setting, {})))
                arms[setting] = self.subject.arm(profile, slots=level, costs=costs)
                stack.callback(arms[setting].close)
            rest = self.subject.resting(slots=level, costs=costs)
            if rest is not None:
                stack.callback(rest.close)
            return confirm(
                arms,
                trace,
                level,
                left=lambda: until - self.budget.spent,
                rest=rest,
                seen=[entry["seen"] for entry in self.journal.of("pair") if entry["level"] == level],
                keep=lambda seen: self.add("pair", level=level, seen=seen),
                progress=progress,
            )

    def choose(
        self,
        trace: Trace,
        learned: Mapping[Setting, Mapping[str, tuple[float, float]]],
        costs: Mapping[int, Costs],
        confirmed: dict[int, dict[Setting, Pairs]],
    ) -> tuple[Setting | None, dict[str, str]]:
        """The fastest that loses at no other concurrency (these are added to `confirmed`), and why others fell."""
        seen = confirmed[self.request.level]
        rest = next((interval for pairs in seen.values() if (interval := pairs.rest()) is not None), None)
        if rest is not None:
            self.note(
                f"the engine that drafts ran at {rest.median:.2f} ({rest.low:.2f}-{rest.high:.2f}) of plain decoding "
                "while nobody drafted: what is chosen has to beat both"
            )
        rejected = {setting.name: why for setting, pairs in seen.items() if (why := pairs.against()) is not None}
        others = [level for level in self.request.concurrency if level != self.request.level]
        for setting in winners(seen):
            for place, level in enumerate(others):
                found = self.confirm(trace, {setting: learned[setting]}, costs[level], len(others) - place)[setting]
                confirmed.setdefault(level, {})[setting] = found
                if found.speedup() is None:
                    self.note(f"{setting.name}: no time was left to look at it with {level} at once")
                elif found.is_slower():
                    rejected[setting.name] = f"slower with {level} at once"
                    break
            if setting.name not in rejected:
                return setting, rejected
        return None, rejected

    # -- small things ---------------------------------------------------------------------------------------------

    def methods(self) -> list[str]:
        """The methods in the grid, the engine's own drafters left out."""
        settings = grid(self.subject.provides, trees=self.subject.trees)
        found = dict.fromkeys(spec.method for setting in settings for spec in setting.proposers)
        return [method for method in found if method != "builtin"]

    def about(self, max_tokens: int) -> dict[str, Any]:
        """What a trace belongs to."""
        here = self.journal.entries[0]["fingerprint"]
        profile, batched = self.subject.profile, self.subject.batched
        return trace_about(here, profile, self.request.prompts, max_tokens, batched=batched)

    def same_model(self, begun: Mapping[str, Any]) -> None:
        """SpecplugError when the model file changed, or went away, while it was measured."""
        now = {"model": fingerprint.model_identity(self.request.model)}
        if fingerprint.changes({"model": begun["fingerprint"]["model"]}, now):
            raise SpecplugError(f"{self.request.model}: changed while it was tuned; nothing was written, tune again")

    def add(self, kind: str, **values: Any) -> dict[str, Any]:
        """Into the journal, with the time spent so far."""
        return self.journal.add(kind, spent=round(self.budget.spent, 3), **values)

    def note(self, text: str) -> None:
        """To the person now, and into the report."""
        self.notes.append(text)
        self.notify(text)

    def tell(self, stage: str, share: float) -> None:
        self.progress(stage, share, self.best, self.budget.left)


def _padded(points: CostPoints) -> CostPoints:
    """Where plain passes get a second row, one row costs what two do."""
    if points.rows[:2] != (1, 2):
        return points
    return replace(points, ms=tuple((line[1], *line[1:]) for line in points.ms))
