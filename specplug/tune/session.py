"""A complete tune, from the request to the written profile. This module is responsible for the order of the stages.

What each stage does is in measuring_stages.py and choosing_stages.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from specplug import profile as profiles
from specplug.machine import hardware
from specplug.profile import CostPoints, Profile
from specplug.tune import journal as journals
from specplug.tune.budget import Budget, Progress, TooSmall
from specplug.tune.candidates import PLAIN
from specplug.tune.choosing_stages import ChoosingStages
from specplug.tune.document import Findings, tune_document, tuned_profile
from specplug.tune.measuring_stages import MeasuringStages
from specplug.tune.prediction import Costs
from specplug.tune.replay import replay
from specplug.tune.subject import Subject
from specplug.tune.tune_request import Request, beside, check, check_journal, journal_path
from specplug.tune.tune_run import TuneRun


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
    """Find the profile and write it. An interrupted tune can be continued with `resume` in the request.

    notify  receives sentences for the user
    opener  opens the subject; by default the engine of the base profile

    UsageError for a request that cannot be tuned, and for a journal that belongs to another request. The profile is
    written at the end, in one step.
    """
    check(request)
    with ExitStack() as stack:
        path = journal_path(request.out)
        journal = stack.enter_context(journals.opened(path, resume=request.resume, notify=notify))
        if journal.entries:
            check_journal(journal, request)
        budget = Budget(request.budget, journal.spent, clock)
        busy = hardware.too_busy()  # before an engine makes the machine busy
        subject = opener(request) if opener else open_subject(request, notify)
        stack.callback(subject.close)
        run = TuneRun(request, subject, journal, budget, notify, progress)
        run.busy = busy
        if busy:
            run.note(f"{busy} are busy with other work, so measured speeds are not reliable")
        names = beside(request)
        if names:
            run.note(f"beside the model, smaller and with its tokenizer: {', '.join(names)}; --draft FILE tries one")
        try:
            return _stages(run)
        except TooSmall as error:
            raise error.named(request.budget) from None


def open_subject(request: Request, notify: Callable[[str], None]) -> Subject:
    """The engine of the base profile, with the model loaded."""
    if request.base.engine == "vllm":
        from specplug.tune.vllm_runner import vllm_subject

        return vllm_subject(
            str(request.model), request.base, named=request.retrieval, most=max(request.concurrency), notify=notify
        )
    from specplug.tune.llama_cpp import LlamaCppSubject

    return LlamaCppSubject(request.model, request.base, drafters=request.drafters, notify=notify)


def _stages(run: TuneRun) -> Outcome:
    """Run all stages in order."""
    request, subject = run.request, run.subject
    measuring, choosing = MeasuringStages(run), ChoosingStages(run)
    begun = measuring.begin()
    lengths = measuring.fit_context()
    threads = measuring.choose_threads()
    choice = measuring.choose_engine_settings(lengths)
    curves = measuring.measure_costs(choice)
    trace, path = measuring.record(lengths, curves)
    expense = measuring.measure_expense(trace)
    first, choice = choice, measuring.choose_with_drafts(choice, trace, expense)
    if choice is not None and first is not None and choice.drafting != first.drafting:
        curves = measuring.measure_costs(choice)

    level = request.level
    padded, most_nodes = subject.limits(level)
    if choice is not None:
        most_nodes = min(most_nodes, choice.nodes)
    points = {curve.sequences: curve.points for curve in curves}
    batch = tuple(points.values()) if subject.batched else ()
    drafters = measuring.trace_drafters(trace)
    live = {
        each: Costs(
            points[each], expense, batch, request.base.vllm.uniform, drafters, limits=subject.memory_limits(each)
        )
        for each in request.concurrency
    }
    costs = replace(live[level], points=_padded(points[level])) if padded else live[level]
    if choice is not None:
        costs = replace(costs, plain_scale=choice.plain_scale)

    predicted = choosing.replay(path, costs, most_nodes)
    finalists = choosing.select_finalists(predicted)
    learned = {setting: predicted[setting].learned for setting in finalists}
    for setting in finalists:  # confirming runs the profile as it will be written, which starts with what was learned
        predicted[setting] = replay(setting, trace, costs, learned=learned[setting])
    predicted[PLAIN] = replay(PLAIN, trace, replace(costs, plain_scale=1.0))
    confirmed = {level: choosing.confirm(trace, learned, live[level], len(request.concurrency), choice)}
    winner, rejected = choosing.select_winner(trace, learned, live, confirmed, choice)
    choosing.check_model(begun)

    findings = Findings(
        request=request,
        fingerprint={**begun["fingerprint"], "threads": threads["chosen"]},
        batched=subject.batched,
        engine_planning=subject.engine_planning,
        model={**subject.about(), "sha256": begun["sha256"]},
        trace=trace,
        threads=threads,
        busy=run.busy,
        engine=choice,
        curves=curves,
        expense=expense,
        predicted=predicted,
        confirmed=confirmed,
        chosen=winner or PLAIN,
        rejected=rejected,
        seconds=run.budget.spent,
        notes=run.notes,
    )
    document = tune_document(findings)
    outcome = Outcome(tuned_profile(findings, document, learned.get(findings.chosen, {})), document)
    profiles.save(outcome.profile, request.out)
    run.add("done", path=str(request.out))
    return outcome


def _padded(points: CostPoints) -> CostPoints:
    """The costs where plain passes are padded to two rows: one row costs as much as two."""
    if points.rows[:2] != (1, 2):
        return points
    return replace(points, ms=tuple((line[1], *line[1:]) for line in points.ms))
