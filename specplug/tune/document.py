"""The results of a tune: the document of `tune --json`, the profile with its evidence, and the verdict in words.

This module formats the results. It measures nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from specplug.corpora import folder
from specplug.machine import hardware
from specplug.machine.folders import expanded
from specplug.planning.cost import CostCurve, oracle_speedup
from specplug.planning.request_time import ALL_ROWS
from specplug.profile import SIZE_LIMIT, Measured, Profile, dumps, user_folder
from specplug.profile.with_drafter import drafter_name, drafters_of
from specplug.profile.with_grammar import with_grammar
from specplug.registry import ProposerSpec
from specplug.tune.budget import with_budget
from specplug.tune.candidates import PLAIN, Setting
from specplug.tune.cost_curves import Curve
from specplug.tune.device_settings import EnginePlanning
from specplug.tune.engine_choice import EngineChoice, with_setting
from specplug.tune.expense import Expense
from specplug.tune.prediction import Prediction, Sums
from specplug.tune.selection import FEWEST_ANSWERS, Pairs
from specplug.tune.trace import Trace
from specplug.tune.tune_request import SCHEMA, Request, workload_hash

KEPT = 8
"""Settings with the best predictions that a profile's evidence keeps. It also keeps the confirmed ones, the best of
each method in each mode of the planner, and the worst."""

LONGER = 4
"""So many times the budget is advised where it did not decide."""

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


def errors(document: Mapping[str, Any]) -> list[float]:
    """Prediction errors |predicted / confirmed - 1| of the settings confirmed at the deciding concurrency."""
    level = str(document["level"])
    result = []
    for line in document["settings"]:
        speedup = (line["confirmed"].get(level) or {}).get("speedup")
        if speedup:
            result.append(abs(line["predicted"]["speedup"] / speedup["median"] - 1))
    return result


def outcome(document: Mapping[str, Any]) -> str:
    """The choice and its speedup, in one line."""
    live = _live(document)
    if document["chosen"] == PLAIN.name:
        if live and not any(result["speedup"] for result in live.values()):
            return "plain decoding: no setting could be run live in this budget"
        answers = document["workload"]["answers"]
        return f"plain decoding: no setting was shown to be faster, with {answers} different answers"
    result = live.get(document["chosen"], {})
    text = f"{document['chosen']}: {_speedup_text(result.get('speedup'), 'plain decoding')}"
    if result.get("over_rest"):
        text += f" and {_speedup_text(result['over_rest'], 'the same engine with drafting disabled')}"
    return text


def verdict(document: Mapping[str, Any]) -> str:
    """The outcome and what to do next, in one line; where plain decoding won, with the result of every finalist."""
    tried = "; ".join(rejections(document)) if document["chosen"] == PLAIN.name else ""
    busy = f"; measured while {document['busy']} were busy: do not rely on it" if document.get("busy") else ""
    return f"{outcome(document)}{f' ({tried})' if tried else ''}; {next_step(document)}{busy}"


def rejections(document: Mapping[str, Any]) -> list[str]:
    """The result of every finalist that was not chosen, and why it was not."""
    live = _live(document)
    return [
        f"{name}: {interval_text(known.get('speedup'), known.get('answers'))}, {why}"
        for name, why in document["rejected"].items()
        for known in [live.get(name, {})]
    ]


def settings_line(document: Mapping[str, Any]) -> str | None:
    """What engine settings alone give, and drafting on top of them, in one line; None where nothing was to choose."""
    engine = document.get("engine_settings")
    if engine is None:
        return None
    gain = engine["settings_speedup"]
    known = "not compared with llama.cpp's own" if gain is None else f"{gain:.2f} times llama.cpp's own"
    alone = f"engine settings alone: {known} ({engine['plain']})"
    chosen = _live(document).get(document["chosen"], {})
    if document["chosen"] == PLAIN.name or not chosen.get("speedup"):
        return f"{alone}; drafting on top: nothing"
    on_top = f"{alone}; drafting on top: {interval_text(chosen['speedup'])}"
    if engine["drafting"] != engine["plain"]:
        on_top += f" ({engine['drafting']})"
    if engine["equality_costs"] is not None and engine["equality_costs"] > 1.0:
        on_top += f"; equal rounding costs a factor of {engine['equality_costs']:.2f} (--allow-rounding)"
    return on_top


OTHER_LENGTHS_GAIN = 1.15
"""Ratio of times from which another setting is named. Few passes are timed at each length: less is within the noise."""


def other_lengths_line(document: Mapping[str, Any]) -> str | None:
    """Where another engine setting than the profile's makes passes far faster, by context length; None where none does.

    Passes of one and two rows for plain decoding, of every measured size for drafts. Where drafts leave the rounding
    alone, only settings whose passes round alike up to as many rows are compared.
    """
    engine = document.get("engine_settings")
    if engine is None:
        return None
    drafts = document["chosen"] != PLAIN.name
    by_name = {line["setting"]: line for line in engine["settings"]}
    chosen = engine["drafting" if drafts else "plain"]
    own = by_name[chosen]
    if drafts and engine["equal"]:
        by_name = {name: line for name, line in by_name.items() if line["equal_rows"] >= own["equal_rows"]}
    parts = []
    for place, context in enumerate(own["contexts"]):
        means = {
            name: geometric_mean(line["ms"][place] if drafts else line["ms"][place][:2])
            for name, line in by_name.items()
        }
        best = min(means, key=means.__getitem__)
        if means[chosen] > OTHER_LENGTHS_GAIN * means[best]:
            parts.append(f"{means[chosen] / means[best]:.2f} times as fast with {context} tokens in the cache ({best})")
    return f"under another engine setting, passes would be {' and '.join(parts)}" if parts else None


SETTINGS_COLUMNS = {
    "engine setting": "the attention kernel and the cache type, and other settings that differ from llama.cpp's own",
    "round alike": "up to how many rows passes give every row the same logits as passes of one row, to the last bit: "
    "drafts in such passes cannot change the output",
    "prompt s": "seconds to read the prompt of the mean request, from measured passes",
    "plain s": "seconds of the mean request without drafts, the prompt included",
    "equal drafts s": "the same with drafts that leave the rounding alone, predicted from replays",
    "any drafts s": "the same with drafts of any size, where these may change the rounding",
    "use": "what it was chosen for",
}
"""Columns of the table of engine settings, and what they mean."""


def settings_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table of engine settings, fastest first; the document has a choice of settings."""
    engine = document["engine_settings"]

    def seconds(ms: float | None) -> str:
        return "-" if ms is None else f"{ms / 1000:.2f}"

    uses = {"plain": "plain decoding", "drafting": "drafts", "stock": "llama.cpp's own"}
    rows = []
    for line in engine["settings"]:
        rounded = line["equal_rows"]
        rows.append(
            [
                line["setting"],
                "no" if rounded < 2 else "yes" if rounded >= ALL_ROWS else f"up to {rounded} rows",
                *(seconds(line[key]) for key in ("reading_ms", "plain_ms", "drafted_ms", "rounding_ms")),
                ", ".join(use for key, use in uses.items() if line["setting"] == engine[key]),
            ]
        )
    return list(SETTINGS_COLUMNS), rows


def next_step(document: Mapping[str, Any]) -> str:
    """What the user can do next."""
    if document["chosen"] == PLAIN.name:
        longer = with_budget(str(document["command"]), LONGER * document["budget_s"])
        more = f"to time more answers: {longer}, or more of your own prompts with --workload"
        if document["fingerprint"]["engine"] == "vllm":
            return f"{more}; until then, use vLLM without specplug: vllm serve MODEL"
        return f"{more}; until then, specplug run --profile default remains right: it drafts only where that saves time"
    path = Path(str(document["path"]))
    ref = path.stem if path.parent == user_folder() and path.suffix == ".yaml" else str(path)
    return f"use it with: {shlex.join(['specplug', 'run', '--profile', ref])}"


def interval_text(interval: Mapping[str, float] | None, answers: int | None = None) -> str:
    """For example `1.24 (1.16-1.33)`; `-` for None.

    `1.24 (-)` where there is no interval: for a single answer, and where `answers` is less than FEWEST_ANSWERS.
    """
    if interval is None:
        return "-"
    known = interval["low"] != interval["high"] and (answers is None or answers >= FEWEST_ANSWERS)
    ends = f"{interval['low']:.2f}-{interval['high']:.2f}" if known else "-"
    return f"{interval['median']:.2f} ({ends})"


def _live(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The live results at the deciding concurrency, by name of the setting."""
    level = str(document["level"])
    return {line["name"]: line["confirmed"][level] for line in document["settings"] if level in line["confirmed"]}


def _speedup_text(interval: Mapping[str, float] | None, base: str) -> str:
    """For example `1.24 times as fast as plain decoding (95% interval 1.16-1.33)`."""
    if interval is None:  # a profile with very many categories keeps no figures of live runs
        return f"faster than {base}"
    ends = f"{interval['low']:.2f}-{interval['high']:.2f}"
    return f"{interval['median']:.2f} times as fast as {base} (95% interval {ends})"


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
