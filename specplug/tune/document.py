"""What came of a tune: the document of `tune --json`, and the profile with its evidence.

Knows findings. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from specplug.machine import hardware
from specplug.planning.cost import CostCurve, oracle_speedup
from specplug.profile import SIZE_LIMIT, Measured, Profile, dumps
from specplug.tune.candidates import PLAIN, Setting
from specplug.tune.cost_curves import Curve
from specplug.tune.expense import Expense
from specplug.tune.prediction import Prediction, Sums
from specplug.tune.selection import Pairs
from specplug.tune.trace import Trace
from specplug.tune.tune_request import SCHEMA, Request, workload_hash

KEPT = 8
"""Settings in a profile's evidence, beside those that were confirmed, the best of each method under each mode of the
planner, and the worst."""

CONTEXT = 256
"""The fill at which the bound of perfect guesses is told."""


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a tune found. `rejected` says of finalists why they were not chosen."""

    request: Request
    fingerprint: Mapping[str, Any]
    batched: bool
    model: Mapping[str, Any]
    trace: Trace
    threads: Mapping[str, Any]
    curves: Sequence[Curve]
    expense: Expense
    predicted: Mapping[Setting, Prediction]
    confirmed: Mapping[int, Mapping[Setting, Pairs]]
    chosen: Setting
    rejected: Mapping[str, str]
    seconds: float
    notes: Sequence[str]


def document(found: Findings) -> dict[str, Any]:
    """The document of `tune --json`, settings by falling prediction."""
    request, trace = found.request, found.trace
    ranked = sorted(found.predicted, key=lambda setting: -found.predicted[setting].total.speedup)
    return {
        "schema": SCHEMA,
        "profile": request.name,
        "path": str(request.out),
        "chosen": found.chosen.name,
        "rejected": dict(found.rejected),
        "level": request.level,
        "date": date.today().isoformat(),
        "command": request.command,
        "budget_s": request.budget,
        "seconds": round(found.seconds, 1),
        "objective": request.objective,
        "concurrency": list(request.concurrency),
        "fingerprint": dict(found.fingerprint),
        "model": dict(found.model),
        "workload": {
            "name": request.workload,
            "sha256": workload_hash(request.prompts),
            "answers": len(trace.answers),
            "tokens": trace.num_tokens,
            "max_tokens": trace.about["max_tokens"],
            "categories": trace.categories(),
        },
        "threads": dict(found.threads),
        "cost": [curve.as_mapping() for curve in found.curves],
        "oracle_speedup": {str(curve.sequences): round(_oracle(curve), 3) for curve in found.curves},
        "expense_us": found.expense.as_mapping(),
        "settings": [_line(found, setting) for setting in ranked],
        "notes": list(found.notes),
    }


def tuned_profile(found: Findings, whole: Mapping[str, Any], learned: Mapping[str, tuple[float, float]]) -> Profile:
    """The profile to write: plain decoding where nothing beats it. `learned` is what its buckets know by now."""
    request = found.request
    threads, model = found.threads["chosen"], request.base.model
    if model is not None and Path(model).expanduser().exists():
        model = str(request.model.resolve())
    runtime = request.base.runtime
    if threads is not None and threads != hardware.usable_cores():  # all of them is what an engine takes anyway
        runtime = replace(runtime, threads=threads)
    machine = {key: value for key, value in found.fingerprint.items() if key != "read_gib_s"}
    if found.batched:
        measured = Measured(machine, None, learned, tuple(curve.points for curve in found.curves))
    else:
        (points,) = [curve.points for curve in found.curves if curve.sequences == request.level]
        measured = Measured(machine, points, learned)
    profile = replace(
        found.chosen.profile(request.base, request.name),
        description=f"Tuned {whole['date']}: {verdict(whole)}",
        model=model,
        runtime=runtime,
        measured=measured,
        evidence=evidence(whole),
    )
    if len(dumps(profile).encode()) > SIZE_LIMIT:  # hundreds of categories
        brief = [
            {**line, "predicted": {**line["predicted"], "categories": {}}, "confirmed": {}}
            for line in whole["settings"]
        ]
        profile = replace(profile, evidence=evidence({**whole, "settings": brief[:KEPT]}))
    return profile


def evidence(whole: Mapping[str, Any]) -> dict[str, Any]:
    """The document with fewer settings, for the profile: the last, which loses most, is always among them."""
    lines = whole["settings"]
    seen: set[tuple[str, str]] = set()
    kept = []
    for place, line in enumerate(lines):
        kind = (line["method"], line["mode"])
        if line["confirmed"] or line["name"] == whole["chosen"] or not place:
            kept.append(line)
        elif place < KEPT or kind not in seen or place == len(lines) - 1:
            kept.append({**line, "predicted": {**line["predicted"], "categories": {}}})
        seen.add(kind)
    return {**whole, "settings": kept, "settings_left_out": len(lines) - len(kept)}


def errors(whole: Mapping[str, Any]) -> list[float]:
    """|predicted / confirmed - 1| of every setting that was confirmed at the deciding concurrency."""
    level = str(whole["level"])
    found = []
    for line in whole["settings"]:
        speedup = (line["confirmed"].get(level) or {}).get("speedup")
        if speedup:
            found.append(abs(line["predicted"]["speedup"] / speedup["median"] - 1))
    return found


def verdict(whole: Mapping[str, Any]) -> str:
    """The outcome in one line."""
    level = str(whole["level"])
    seen = {line["name"]: line["confirmed"][level] for line in whole["settings"] if level in line["confirmed"]}
    live = {name: found["speedup"] for name, found in seen.items()}
    if whole["chosen"] != PLAIN.name:
        told = f"{whole['chosen']}: {interval_text(live.get(whole['chosen']))} of plain decoding"
        over = seen.get(whole["chosen"], {}).get("over_rest")
        return f"{told}, {interval_text(over)} of an engine at rest" if over else told
    tried = [f"{name} {interval_text(live.get(name))} {why}" for name, why in whole["rejected"].items()]
    if not any(live.values()):
        return "plain decoding: there was no time to try anything live; raise the budget"
    return f"plain decoding: nothing else was shown to be faster here ({'; '.join(tried)})"


def interval_text(interval: Mapping[str, float] | None) -> str:
    """For example `1.24 (1.16-1.33)`."""
    return "-" if interval is None else f"{interval['median']:.2f} ({interval['low']:.2f}-{interval['high']:.2f})"


def _line(found: Findings, setting: Setting) -> dict[str, Any]:
    """One setting with all that is known of it; `accepted_at` is by position: of the drafts that long, the share that
    was right up to there."""
    prediction = found.predicted[setting]
    kinds = prediction.by_category()
    live = {level: pairs[setting] for level, pairs in found.confirmed.items() if setting in pairs}
    return {
        "name": setting.name,
        "method": setting.method,
        "mode": setting.planner.mode,
        "predicted": {**_sums(prediction.total), "categories": {kind: _sums(sums) for kind, sums in kinds.items()}},
        "confirmed": {
            str(level): {**_pairs(pairs, None), "categories": {kind: _pairs(pairs, kind) for kind in pairs.answers}}
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
        "accepted_at": [round(right / times, 4) for right, times in offered if times],
    }


def _pairs(pairs: Pairs, kind: str | None) -> dict[str, Any]:
    speedup, rest = pairs.speedup(kind), pairs.over_rest(kind)
    tokens, seconds, *_ = pairs.totals(kind)
    return {
        "answers": len(pairs.answers[kind]) if kind else sum(map(len, pairs.answers.values())),
        "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        "speedup": speedup.as_mapping() if speedup is not None else None,
        **({"over_rest": rest.as_mapping()} if rest is not None else {}),
    }


def _oracle(curve: Curve) -> float:
    points = curve.points
    return oracle_speedup(CostCurve(points.contexts, points.rows, points.ms), CONTEXT, curve.sequences)
