"""The results of a tune: the document of `tune --json`, and the profile with its evidence.

This module formats the results. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from specplug.corpora import folder
from specplug.machine import hardware
from specplug.machine.folders import expanded
from specplug.planning.cost import CostCurve, oracle_speedup
from specplug.profile import SIZE_LIMIT, Measured, Profile, dumps
from specplug.profile.with_drafter import drafter_name, drafters_of
from specplug.profile.with_grammar import with_grammar
from specplug.registry import ProposerSpec
from specplug.tune.candidates import Setting
from specplug.tune.cost_curves import Curve
from specplug.tune.device_settings import EnginePlanning
from specplug.tune.engine_choice import EngineChoice, with_setting
from specplug.tune.expense import Expense
from specplug.tune.prediction import Prediction, Sums
from specplug.tune.selection import Pairs
from specplug.tune.trace import Trace
from specplug.tune.tune_request import SCHEMA, Request, workload_hash
from specplug.tune.verdict import outcome

KEPT = 8
"""Settings with the best predictions that a profile's evidence keeps. It also keeps the confirmed ones, the best of
each method in each mode of the planner, and the worst."""

CONTEXT = 256
"""Tokens in the cache at which the speedup of an oracle, whose draft tokens are all accepted, is reported."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that a tune found.

    batched    whether costs were measured by batch size
    engine_planning  how vLLM chooses the draft tokens; None where specplug's planner does
    busy       how many cores other programs kept busy at the beginning, in words; None where few
    engine     the choice of engine settings; None where there was none to make
    confirmed  paired measurements by concurrency and setting
    rejected   by name of a finalist, why it was not chosen
    seconds    that the tune took
    notes      sentences for the user
    """

    request: Request
    fingerprint: Mapping[str, Any]
    batched: bool
    engine_planning: EnginePlanning | None
    model: Mapping[str, Any]
    trace: Trace
    threads: Mapping[str, Any]
    busy: str | None
    engine: EngineChoice | None
    curves: Sequence[Curve]
    expense: Expense
    predicted: Mapping[Setting, Prediction]
    confirmed: Mapping[int, Mapping[Setting, Pairs]]
    chosen: Setting
    rejected: Mapping[str, str]
    seconds: float
    notes: Sequence[str]


def tune_document(findings: Findings) -> dict[str, Any]:
    """The document of `tune --json`; settings are sorted by predicted speedup, best first."""
    request, trace = findings.request, findings.trace
    ranked = sorted(findings.predicted, key=lambda setting: -findings.predicted[setting].total.speedup)
    return {
        "schema": SCHEMA,
        "profile": request.name,
        "path": str(request.out),
        "chosen": findings.chosen.name,
        "rejected": dict(findings.rejected),
        "level": request.level,
        "date": date.today().isoformat(),
        "command": request.command,
        "budget_s": request.budget,
        "seconds": round(findings.seconds, 1),
        "objective": request.objective,
        "concurrency": list(request.concurrency),
        "fingerprint": dict(findings.fingerprint),
        "model": dict(findings.model),
        "workload": {
            "name": request.workload,
            "sha256": workload_hash(request.prompts),
            "answers": len(trace.answers),
            "tokens": trace.num_tokens,
            "max_tokens": trace.about["max_tokens"],
            "categories": trace.categories(),
        },
        "threads": dict(findings.threads),
        "busy": findings.busy,
        "engine_settings": findings.engine.as_mapping() if findings.engine is not None else None,
        "cost": [curve.as_mapping() for curve in findings.curves],
        "oracle_speedup": {str(curve.sequences): round(_oracle(curve), 3) for curve in findings.curves},
        "expense_us": findings.expense.as_mapping(),
        "settings": [_line(findings, setting) for setting in ranked],
        "notes": list(findings.notes),
    }


def tuned_profile(
    findings: Findings, document: Mapping[str, Any], learned: Mapping[str, tuple[float, float]]
) -> Profile:
    """The profile to write: plain decoding where no setting beats it.

    document  the document of the tune
    learned   the acceptance counts that the buckets of the chosen setting have learned
    """
    request = findings.request
    threads, model = findings.threads["chosen"], request.base.model
    if model is not None and expanded(model).exists():
        model = str(request.model.absolute())
    runtime = request.base.runtime
    if threads is not None and threads != hardware.usable_cores():  # engines use all cores by default
        runtime = replace(runtime, threads=threads)
    batch = findings.threads["batch"]
    if batch != threads:
        runtime = replace(runtime, threads=threads, threads_batch=batch)
    if findings.engine is not None:
        speculates = findings.chosen.speculates
        runtime = with_setting(runtime, findings.engine.drafting if speculates else findings.engine.plain)
    machine = {key: value for key, value in findings.fingerprint.items() if key != "read_gib_s"}
    if findings.batched:  # where vLLM chooses the number of draft tokens, it reads no costs
        costs = () if findings.engine_planning else tuple(curve.points for curve in findings.curves)
        measured = Measured(machine, None, learned, costs)
    elif request.level == 1 and findings.engine is not None and not findings.chosen.speculates:
        # The other curves hold under the setting for drafts.
        measured = Measured(machine, findings.engine.table[findings.engine.plain].points, learned)
    else:
        (points,) = [curve.points for curve in findings.curves if curve.sequences == request.level]
        measured = Measured(machine, points, learned)
    if findings.busy and not findings.batched:  # the planner will learn what passes cost
        measured = replace(measured, cost_curve=None)
    chosen = with_grammar(findings.chosen.profile(request.base, request.name))  # no trace has constraints
    profile = replace(
        chosen,
        proposers=tuple(map(_with_absolute_path, chosen.proposers)),
        description=f"Tuned {document['date']}: {outcome(document)}",
        model=model,
        runtime=runtime,
        measured=measured,
        evidence=evidence(document),
    )
    if len(dumps(profile).encode()) > SIZE_LIMIT:  # happens with hundreds of categories
        brief = [
            {**line, "predicted": {**line["predicted"], "categories": {}}, "confirmed": {}}
            for line in document["settings"]
        ]
        profile = replace(profile, evidence=evidence({**document, "settings": brief[:KEPT]}))
    return profile


def _with_absolute_path(spec: ProposerSpec) -> ProposerSpec:
    """A drafter in a file, and a corpus in a folder, are found from every folder."""
    if "corpora" in spec.options:
        corpora = [
            ref if folder.NAME.fullmatch(ref) else f"{folder.place(ref).absolute()}/" for ref in spec.options["corpora"]
        ]
        return replace(spec, options={**spec.options, "corpora": corpora})
    path = expanded(spec.options.get("model", ""))
    if not spec.options.get("model") or not path.is_file():
        return spec
    return replace(spec, options={**spec.options, "model": str(path.absolute())})


def evidence(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with fewer settings, for the profile; the slowest one is always kept."""
    lines = document["settings"]
    known: set[tuple[str, ...]] = set()
    kept = []
    for place, line in enumerate(lines):
        key = (line["method"], line["mode"], *line["drafters"])
        if line["confirmed"] or line["name"] == document["chosen"] or not place:
            kept.append(line)
        elif place < KEPT or key not in known or place == len(lines) - 1:
            kept.append({**line, "predicted": {**line["predicted"], "categories": {}}})
        known.add(key)
    return {**document, "settings": kept, "settings_left_out": len(lines) - len(kept)}


def _line(findings: Findings, setting: Setting) -> dict[str, Any]:
    """One setting in the document.

    `accepted_at` is by position in the draft: of the drafts that were that long, the share that was accepted up to it.
    """
    prediction = findings.predicted[setting]
    categories = prediction.by_category()
    live = {level: pairs[setting] for level, pairs in findings.confirmed.items() if setting in pairs}
    return {
        "name": setting.name,
        "method": setting.method,
        "mode": setting.planner.mode,
        "drafters": [drafter_name(spec) for spec in drafters_of(setting.proposers)],
        "predicted": {
            **_sums(prediction.total),
            "categories": {category: _sums(sums) for category, sums in categories.items()},
        },
        "confirmed": {
            str(level): {
                **_pairs(pairs, None),
                "categories": {category: _pairs(pairs, category) for category in pairs.answers},
            }
            for level, pairs in live.items()
        },
    }


def _sums(sums: Sums) -> dict[str, Any]:
    offered = zip(sums.accepted_at, sums.offered_at, strict=True)
    return {
        "speedup": round(sums.speedup, 4),
        "tokens_per_second": round(1000 * sums.tokens / sums.ms, 2) if sums.ms else None,
        "mean_acceptance_length": round(sums.mean_acceptance_length, 4),
        "drafted_per_step": round(sums.drafted / sums.steps, 3) if sums.steps else 0.0,
        "accepted_at": [round(accepted / times, 4) for accepted, times in offered if times],
    }


def _pairs(pairs: Pairs, category: str | None) -> dict[str, Any]:
    speedup, over_idle = pairs.speedup(category), pairs.speedup_over_idle(category)
    tokens, seconds, *_ = pairs.totals(category)
    return {
        "answers": len(pairs.answers[category]) if category else sum(map(len, pairs.answers.values())),
        "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        "speedup": speedup.as_mapping() if speedup is not None else None,
        **({"over_rest": over_idle.as_mapping()} if over_idle is not None else {}),
    }


def _oracle(curve: Curve) -> float:
    points = curve.points
    return oracle_speedup(CostCurve(points.contexts, points.rows, points.ms), CONTEXT, curve.sequences)
