"""A whole tune: fingerprint, cost, record, replay, confirm, write. Every step is in the journal before the next.

Knows the order of things and the document that comes of them. Knows no engine inside, and no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from specplug import fingerprint, hardware, registry
from specplug import profile as profiles
from specplug.bench.arms import Arm
from specplug.bench.workloads import Prompt, categories
from specplug.cost import CostCurve, oracle_speedup
from specplug.errors import EngineError, SpecplugError, UsageError
from specplug.profile import CostPoints, Measured, Profile
from specplug.registry import ProposerSpec
from specplug.tune import journal as journals
from specplug.tune.budget import Budget, answers_to_record
from specplug.tune.choose import Pairs, candidates, winner
from specplug.tune.confirm import confirm
from specplug.tune.cost import Curve, choose_threads, measure_curve
from specplug.tune.document import evidence, setting_line, verdict
from specplug.tune.expense import Expense
from specplug.tune.journal import Journal
from specplug.tune.recording import SLOTS, known_trace, record, record_asides, trace_path
from specplug.tune.replay import Costs, Prediction, replay, replay_all
from specplug.tune.request import (
    SCHEMA,
    Request,
    check,
    check_journal,
    decisive_level,
    journal_path,
    unfinished,
    workload_hash,
)
from specplug.tune.settings import NONE, Setting, grid
from specplug.tune.subject import Subject
from specplug.tune.trace import Trace

CONTEXTS = (256, 2048, 8192)
"""Fills at which costs are measured, as far as the base profile's context and the time allow."""

ROWS, MANY_ROWS = 25, 96
"""Further rows than one per sequence up to which costs are measured; many, where ROWS of them cost less than STEEP
times as much as none."""

STEEP = 3.0

ASIDE_NODES, ASIDE_TOKENS = 8, 2.2
"""A tree of so many guesses brings at most about so many tokens a pass where it learns from top ids alone: where such
a pass costs more, what such a method learns from wrong guesses is not recorded."""

Progress = Callable[[str, float, str], None]
"""Told the stage, the share of it that is done, and what is best so far."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The profile as written, and the document of `tune --json`."""

    profile: Profile
    document: dict[str, Any]


def tune(
    request: Request,
    *,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda stage, share, best: None,
    opener: Callable[[Request], Subject] | None = None,
) -> Outcome:
    """Find and write the profile. Interrupted, it can be continued with `resume`. `opener` opens another engine.

    UsageError for what cannot be tuned, and for a journal that belongs to something else; the profile is written last,
    whole or not at all.
    """
    check(request)
    path = journal_path(request.out)
    if not request.resume and path.is_file() and unfinished(path):
        say("an unfinished tune of this profile is dropped; --resume would have continued it")
    with journals.opened(path, resume=request.resume) as journal, ExitStack() as stack:
        if journal.torn:
            say("the journal's last line was half written; that step is done again")
        if journal.entries:
            check_journal(journal, request)
        budget = Budget(request.budget, journal.entries[-1]["spent"] if journal.entries else 0.0)
        subject = (opener or open_subject)(request)
        stack.callback(subject.close)
        session = _Session(request, subject, journal, budget, say, progress)
        outcome = session.run()
        profiles.save(outcome.profile, request.out)
        session.add("done", path=str(request.out))
    return outcome


def open_subject(request: Request) -> Subject:
    """The engine of the base profile with the model in it."""
    if request.base.engine != "llama-cpp":
        raise EngineError(
            f"tune cannot measure engine {request.base.engine} yet; use --engine llama-cpp, or a shipped profile"
        )
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
        say: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self.request = request
        self.subject = subject
        self.journal = journal
        self.budget = budget
        self.say = say
        self.progress = progress
        self.notes: list[str] = []
        self.best = ""

    def run(self) -> Outcome:
        self.begin()
        lengths = self.fit()
        threads = self.threads()
        curves = self.cost()
        trace, path = self.record(lengths, curves)
        expense = self.expense(trace)
        costs = {curve.sequences: Costs(curve.points, expense) for curve in curves}
        level = decisive_level(self.request)
        predicted = self.replay(trace, path, costs[level])
        finalists = self.finalists(predicted)
        learned = {setting: predicted[setting].learned for setting in finalists}
        for setting in finalists:  # what is confirmed is what will be written, which knows what was learned here
            predicted[setting] = replay(setting, trace, costs[level], learned=learned[setting])
        order = [level, *(other for other in self.request.concurrency if other != level)]
        confirmed: dict[int, dict[Setting, Pairs]] = {}
        chosen: Setting | None = None
        for place, at in enumerate(order):
            still = finalists if at == level else [chosen] if chosen is not None else []
            if not still:
                break
            until = self.budget.spent + self.budget.left / (len(order) - place)
            confirmed[at] = self.confirm(trace, {s: learned[s] for s in still}, costs[at].points, until)
            if at == level:
                chosen = winner(confirmed[at])
            elif (interval := confirmed[at][still[0]].speedup()) is not None and interval.high < 1.0:
                self.note(f"{still[0].name} is faster with {level} at once and slower with {at}: not chosen")
                chosen = None
        self.same_model()
        document = self.document(trace, threads, curves, expense, predicted, confirmed, chosen)
        profile = self.profile(document, chosen, learned, threads["chosen"], costs[level].points)
        return Outcome(profile, document)

    # -- stages ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The machine as it is now, and how busy."""
        if not self.journal.entries:
            here = fingerprint.of(self.request.model, engine=self.request.base.engine, threads=None)
            here["read_gib_s"] = hardware.read_bandwidth()
            self.add("begun", schema=SCHEMA, request=self.request.identity(), fingerprint=here)
        busy = hardware.busy_warning()
        if busy:
            self.note(busy)

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
                raise UsageError(
                    f"{request.workload}: prompt {prompt.id} takes {needed} tokens with its answers, the context "
                    f"{context}; raise runtime: context, or drop the prompt"
                )
            longest = max(longest, needed)
            lengths[prompt.category].append(length)
        subject.use(context=-(-longest // 256) * 256)
        return lengths

    def threads(self) -> dict[str, Any]:
        """Chosen by measuring, unless somebody said how many."""
        known = self.journal.last("threads")
        if known is None:
            chosen = self.subject.profile.runtime.threads or 1
            ms: dict[int, float] = {}
            if self.request.base.runtime.threads is None and hardware.usable_cores() > 1:
                self.tell("threads", 0.0)
                with self.subject.timer(sequences=1, tokens=128, limit=4) as timer:
                    timer.fill(64)
                    chosen, ms = choose_threads(timer, hardware.usable_cores(), self.budget.of("threads"))
            known = self.add("threads", chosen=chosen, one_row_ms={str(count): value for count, value in ms.items()})
        self.subject.use(threads=known["chosen"])
        return {"chosen": known["chosen"], "one_row_ms": known["one_row_ms"]}

    def cost(self) -> list[Curve]:
        """T(rows, context) for every concurrency."""
        known = {entry["curve"]["sequences"]: Curve.from_mapping(entry["curve"]) for entry in self.journal.of("cost")}
        levels = self.request.concurrency
        open_ = [level for level in levels if level not in known]
        seconds = self.budget.of("cost") / max(1, len(open_))
        for level in open_:
            room = self.request.base.runtime.context - MANY_ROWS
            fills = [fill for fill in CONTEXTS if fill <= room] or [max(1, room)]
            if level > 1:  # every sequence has to be filled
                fills = fills[:1]
            with self.subject.timer(sequences=level, tokens=fills[-1], limit=level + MANY_ROWS) as timer:
                few, more = (min(timer.time(rows) for _ in range(3)) for rows in (level, level + ROWS))
                limit = level + (ROWS if more > STEEP * few else MANY_ROWS)
                known[level] = measure_curve(
                    timer, limit, fills, seconds, progress=lambda share: self.tell("cost", share)
                )
            self.add("cost", curve=known[level].as_mapping())
        for level in levels:
            for text in known[level].notes:
                self.note(f"cost with {level} at once: {text}")
        return [known[level] for level in levels]

    def record(self, lengths: Mapping[str, Sequence[int]], curves: Sequence[Curve]) -> tuple[Trace, Path]:
        """The target's own answers, in turn by category."""
        request, curve = self.request, curves[0]
        slots = 1 if self.subject.profile.exact else SLOTS
        row_ms = CostCurve(curve.points.contexts, curve.points.rows, curve.points.ms).at(256)
        seconds = self.budget.of("record")
        turns = max(len(prompt.turns) for prompt in request.prompts)
        order, tokens = answers_to_record(
            lengths,
            request.max_tokens,
            seconds=seconds,
            prompt_ms=curve.prompt_ms,
            token_ms=turns * row_ms[min(slots, len(row_ms)) - 1] / slots,
        )
        if tokens < request.max_tokens:
            self.note(f"answers of {tokens} tokens instead of {request.max_tokens}: the budget allows no more")
        if len(order) < len(request.prompts):
            self.note(f"{len(order)} of {len(request.prompts)} prompts are used: the budget allows no more")
        by_kind: dict[str, list[Prompt]] = {}
        for prompt in request.prompts:
            by_kind.setdefault(prompt.category, []).append(prompt)
        prompts = [by_kind[kind][index] for kind, index in order]
        about = self.about(tokens)
        path = trace_path(about)
        trace = known_trace(path, about, self.say)
        trace = record(
            self.subject, trace, prompts, path, seconds=seconds, progress=lambda share: self.tell("record", share)
        )
        if self.asides_matter(row_ms):
            trace = record_asides(
                self.subject,
                trace,
                path,
                seconds=self.budget.of("asides"),
                progress=lambda share: self.tell("asides", share),
            )
        if self.journal.last("record") is None:
            self.add("record", trace=str(path), answers=len(trace.answers), tokens=trace.num_tokens)
        if not trace.num_tokens:
            raise UsageError(f"{request.workload}: the model answers nothing at all; give it other prompts")
        return trace, path

    def asides_matter(self, row_ms: Sequence[float]) -> bool:
        """Whether a method that learns from rows after wrong guesses could pay at all, were it as good as any."""
        readers = any(one.needs.topk for one in registry.build_sources([ProposerSpec(m) for m in self.methods()]))
        return readers and row_ms[min(ASIDE_NODES, len(row_ms) - 1)] < ASIDE_TOKENS * row_ms[0]

    def expense(self, trace: Trace) -> Expense:
        """What drafting itself costs here."""
        known = self.journal.last("expense")
        if known is None:
            self.tell("expense", 0.0)
            prompts = [answer.prompt for answer in trace.answers[: len(trace.categories())]]
            found = self.subject.expense(prompts, self.methods(), self.budget.of("expense"))
            known = self.add("expense", expense=found.as_mapping())
        return Expense.from_mapping(known["expense"])

    def replay(self, trace: Trace, path: Path, costs: Costs) -> dict[Setting, Prediction]:
        """Every setting over the trace, as far as time allows; repeated where a tune goes on, since it is cheap."""
        limit = costs.points.rows[-1] - costs.points.sequences
        settings = [
            setting
            for setting in grid(self.subject.gives, trees=self.subject.trees)
            if setting.planner.mode == "measured" or setting.planner.max_nodes <= limit
        ]
        predicted: dict[Setting, Prediction] = {}
        seconds = self.budget.of("replay")
        for setting, prediction in replay_all(settings, path, costs, seconds=seconds):
            predicted[setting] = prediction
            best = max(predicted, key=lambda one: predicted[one].total.speedup)
            self.best = f"{best.name} {predicted[best].total.speedup:.2f} predicted"
            self.tell("replay", len(predicted) / len(settings))
        if len(predicted) < len(settings):
            self.note(f"{len(predicted)} of {len(settings)} settings were replayed: the budget allows no more")
        return {setting: predicted[setting] for setting in settings if setting in predicted}

    def finalists(self, predicted: dict[Setting, Prediction]) -> list[Setting]:
        """Those to confirm; the same ones where a tune goes on."""
        known = self.journal.last("finalists")
        chosen = candidates({setting: one.total.speedup for setting, one in predicted.items()})
        if known is not None:
            chosen = [setting for setting in predicted if setting.name in known["names"]]
        if known is None or len(chosen) < len(known["names"]):
            self.add("finalists", names=[setting.name for setting in chosen])
        return chosen

    def confirm(
        self,
        trace: Trace,
        learned: Mapping[Setting, Mapping[str, tuple[float, float]]],
        points: CostPoints,
        until: float,
    ) -> dict[Setting, Pairs]:
        """The finalists and plain decoding, live, until so many seconds of the budget are spent."""
        level = points.sequences

        def progress(pairs: Mapping[Setting, Pairs]) -> None:
            found = {setting: line.speedup() for setting, line in pairs.items()}
            speeds = {setting: interval.median for setting, interval in found.items() if interval is not None}
            if speeds:
                best = max(speeds, key=speeds.__getitem__)
                self.best = f"{best.name} {speeds[best]:.2f}"
            self.tell("confirm", min(1.0, self.budget.spent / self.budget.seconds))

        with ExitStack() as stack:
            arms: dict[Setting, Arm] = {}
            for setting in (NONE, *learned):
                profile = setting.profile(self.subject.profile, "none" if setting == NONE else "candidate")
                profile = replace(profile, measured=Measured(acceptance=learned.get(setting, {})))
                arms[setting] = self.subject.arm(profile, slots=level, cost=points)
                stack.callback(arms[setting].close)
            return confirm(
                arms,
                trace,
                level,
                left=lambda: until - self.budget.spent,
                seen=[entry["seen"] for entry in self.journal.of("pair") if entry["level"] == level],
                keep=lambda seen: self.add("pair", level=level, seen=seen),
                progress=progress,
            )

    # -- what comes of it -----------------------------------------------------------------------------------------

    def document(
        self,
        trace: Trace,
        threads: Mapping[str, Any],
        curves: Sequence[Curve],
        expense: Expense,
        predicted: Mapping[Setting, Prediction],
        confirmed: Mapping[int, Mapping[Setting, Pairs]],
        chosen: Setting | None,
    ) -> dict[str, Any]:
        """The document of `tune --json`, settings by falling prediction."""
        request = self.request
        ranked = sorted(predicted, key=lambda setting: -predicted[setting].total.speedup)
        return {
            "schema": SCHEMA,
            "profile": request.name,
            "path": str(request.out),
            "chosen": (chosen or NONE).name,
            "level": decisive_level(request),
            "date": date.today().isoformat(),
            "command": request.command,
            "budget_s": request.budget,
            "seconds": round(self.budget.spent, 1),
            "objective": request.objective,
            "concurrency": list(request.concurrency),
            "fingerprint": {**self.journal.entries[0]["fingerprint"], "threads": threads["chosen"]},
            "model": {**self.subject.about(), "sha256": fingerprint.sha256(request.model)},
            "workload": {
                "name": request.workload,
                "sha256": workload_hash(request.prompts),
                "answers": len(trace.answers),
                "tokens": trace.num_tokens,
                "max_tokens": trace.about["max_tokens"],
                "categories": trace.categories(),
            },
            "threads": dict(threads),
            "cost": [curve.as_mapping() for curve in curves],
            "oracle_speedup": {
                str(c.sequences): round(oracle_speedup(CostCurve(p.contexts, p.rows, p.ms), 256, c.sequences), 3)
                for c, p in [(curve, curve.points) for curve in curves]
            },
            "expense_us": expense.as_mapping(),
            "settings": [
                setting_line(
                    setting,
                    predicted[setting],
                    {level: pairs[setting] for level, pairs in confirmed.items() if setting in pairs},
                )
                for setting in ranked
            ],
            "notes": self.notes,
        }

    def profile(
        self,
        document: Mapping[str, Any],
        chosen: Setting | None,
        learned: Mapping[Setting, Mapping[str, tuple[float, float]]],
        threads: int,
        points: CostPoints,
    ) -> Profile:
        """The profile to write: plain decoding where nothing beats it."""
        request, setting = self.request, chosen or NONE
        runtime = request.base.runtime
        if threads != hardware.usable_cores():  # all of them is what an engine takes anyway
            runtime = replace(runtime, threads=threads)
        return replace(
            setting.profile(request.base, request.name),
            description=f"Tuned {document['date']}: {verdict(document)}",
            model=request.base.model,
            runtime=runtime,
            measured=Measured(self.fingerprint(threads), points, learned.get(setting, {})),
            evidence=evidence(document),
        )

    def fingerprint(self, threads: int) -> dict[str, Any]:
        here = {**self.journal.entries[0]["fingerprint"], "threads": threads}
        del here["read_gib_s"]  # a measurement, not a name
        return here

    def same_model(self) -> None:
        """SpecplugError when the model file changed, or went away, while it was measured."""
        known = {"model": self.journal.entries[0]["fingerprint"]["model"]}
        changed = fingerprint.changes(known, {"model": fingerprint.model_identity(self.request.model)})
        if changed:
            raise SpecplugError(f"{self.request.model}: changed while it was tuned; nothing was written, tune again")

    # -- small things ---------------------------------------------------------------------------------------------

    def methods(self) -> list[str]:
        """The methods in the grid."""
        settings = grid(self.subject.gives, trees=self.subject.trees)
        return list(dict.fromkeys(spec.method for setting in settings for spec in setting.proposers))

    def about(self, max_tokens: int) -> dict[str, Any]:
        """What a trace belongs to: all that decides which tokens come."""
        runtime = self.subject.profile.runtime
        here = self.journal.entries[0]["fingerprint"]
        return {
            "model": {key: here["model"][key] for key in ("bytes", "sample_sha256")},
            "versions": {key: value for key, value in here["versions"].items() if key != "specplug"},
            "workload": workload_hash(self.request.prompts),
            "max_tokens": max_tokens,
            "kv_type": runtime.kv_type,
            "flash_attention": runtime.flash_attention,
            "exact": self.subject.profile.exact,
        }

    def add(self, kind: str, **values: Any) -> dict[str, Any]:
        """Into the journal, with the time spent so far."""
        return self.journal.add(kind, spent=round(self.budget.spent, 3), **values)

    def note(self, text: str) -> None:
        """To the person now, and into the report."""
        self.notes.append(text)
        self.say(text)

    def tell(self, stage: str, share: float) -> None:
        self.progress(stage, share, self.best)
