"""The results of a tune of a server: the document of `tune --json`, the profile, and the verdict in words.

This module formats the results. It measures nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from specplug.profile import Measured, Profile
from specplug.profile.settings import ServerSettings
from specplug.profile.shown_command import without_keys
from specplug.registry import ProposerSpec
from specplug.subjects.subject import Abilities
from specplug.tune.budget import with_budget
from specplug.tune.selection import FEWEST_ANSWERS
from specplug.tune.server_flags.recorded_questions import Timed
from specplug.tune.server_flags.server_candidates import ENGINE_NAME, PLAIN_NAME, Candidate
from specplug.tune.server_flags.server_predictions import Predicted
from specplug.tune.server_flags.server_request import SERVER_SCHEMA, ServerRequest
from specplug.tune.server_flags.server_stages import ServerCosts
from specplug.tune.server_flags.successive_elimination import CandidateRun
from specplug.tune.tune_request import workload_hash
from specplug.tune.verdict import LONGER, interval_text

PERCENTILES = (50, 95, 99)

KEPT = 24
"""Rows that were not run live which a profile's evidence keeps, the best by prediction."""

SERVER_COLUMNS = {
    "flags tried": "'none' is plain decoding, the server's command as it was given. For lookup types: how many tokens "
    "are looked up, and up to how many are drafted",
    "predicted": "the speed relative to plain decoding, from replaying plain answers with what passes cost",
    "tokens/pass": "tokens that a pass of the model yields: 1.00 for plain decoding, from the replay",
    "measured": "the speed relative to plain decoding in live runs, with its 95% interval; '-' where there is none",
    "tokens/s": "of one request, behind the first token",
    "first token": "milliseconds until the first token, with the prompt in the server's cache: the median and the 95th "
    "percentile",
    "between": "milliseconds between two pieces of text: the median and the 95th percentile",
    "": "what became of it",
}
"""Columns of the table, and what they mean."""


@dataclass(frozen=True, slots=True)
class ServerFindings:
    """Everything that a tune of a server found.

    answers, tokens  of the plain answers that were recorded
    costs            None where nothing was predicted
    tried            all candidates
    runs           those that ran live
    levels           the chosen one, or the best, at further concurrencies
    engine           specplug's own engine; None where it was not run
    winner           None for plain decoding
    busy             how many cores other programs kept busy, in words; None where few
    """

    request: ServerRequest
    abilities: Abilities
    answers: int
    tokens: int
    costs: ServerCosts | None
    tried: Sequence[Candidate]
    predictions: Mapping[str, Predicted]
    runs: Sequence[CandidateRun]
    levels: Mapping[int, CandidateRun]
    engine: CandidateRun | None
    winner: CandidateRun | None
    busy: str | None
    seconds: float
    notes: Sequence[str]


def server_document(findings: ServerFindings) -> dict[str, Any]:
    """The document of `tune --server --json`; rows that ran live come first, then the others by prediction."""
    request, winner = findings.request, findings.winner
    flags = list(winner.candidate.flags) if winner is not None else []
    live = {run.candidate.name for run in findings.runs}
    rest = [one for one in findings.tried if one.name not in live]
    rest.sort(key=lambda one: -findings.predictions[one.name].speedup if one.name in findings.predictions else 0.0)
    ranked = sorted(findings.runs, key=lambda run: -run.median)
    plain = [answer for run in ranked for answer in run.plain]
    return {
        "schema": SERVER_SCHEMA,
        "kind": "server",
        "profile": request.name,
        "path": str(request.out),
        "chosen": winner.candidate.name if winner is not None else PLAIN_NAME,
        "server": without_keys(request.command.argv),
        "flags": flags,
        "argv": without_keys(request.command.with_flags(flags)),
        "level": request.level,
        "concurrency": list(request.concurrency),
        "objective": request.objective,
        "date": date.today().isoformat(),
        "command": request.invoked,
        "budget_s": request.budget,
        "seconds": round(findings.seconds, 1),
        "busy": findings.busy,
        "fingerprint": request.fingerprint(),
        "abilities": {
            "kind": findings.abilities.kind,
            "version": findings.abilities.version,
            "model": findings.abilities.model,
            "slots": findings.abilities.slots,
            "context": findings.abilities.context,
        },
        "workload": {
            "name": request.workload,
            "sha256": workload_hash(request.prompts),
            "answers": findings.answers,
            "tokens": findings.tokens,
            "max_tokens": request.max_tokens,
        },
        "pass_ms": _pass_ms(findings.costs),
        "replay_agreement": [
            {"name": one.name, "server": list(one.server), "replay": list(one.replay)}
            for one in (findings.costs.agreements if findings.costs is not None else ())
        ],
        "rows": [
            {"name": PLAIN_NAME, "flags": [], "predicted": None, "live": _speeds(plain), "state": "plain decoding"},
            *(_live_row(run, findings) for run in ranked),
            *([_live_row(findings.engine, findings)] if findings.engine is not None else []),
            *(_replayed_row(one, findings) for one in rest),
        ],
        "levels": {
            str(level): {
                "name": run.candidate.name,
                "speedup": _interval(run),
                "answers": len(run.judged.groups),
                "own": _speeds(run.own),
                "plain": _speeds(run.plain),
                "failure": run.failure,
            }
            for level, run in findings.levels.items()
        },
        "notes": list(findings.notes),
    }


def server_profile(findings: ServerFindings, document: Mapping[str, Any]) -> Profile:
    """The profile to write: the user's command with the flags that were found."""
    request = findings.request
    live = [row for row in document["rows"] if row["live"] is not None or row.get("failure")]
    rest = [row for row in document["rows"] if row not in live]
    kept = {**document, "rows": [*live, *rest[:KEPT]], "rows_left_out": max(0, len(rest) - KEPT)}
    return Profile(
        request.name,
        description=f"{_described(document)} (tuned {document['date']})",
        engine="server",
        model=None,
        proposers=(ProposerSpec("none"),),
        server=ServerSettings(tuple(request.command.argv), tuple(document["flags"])),
        measured=Measured(document["fingerprint"]),
        evidence=kept,
    )


def server_verdict(document: Mapping[str, Any]) -> str:
    """What was found, in one line or two sentences."""
    chosen = next((row for row in document["rows"] if row["name"] == document["chosen"]), None)
    busy = f"; measured while {document['busy']} were busy: do not rely on it" if document["busy"] else ""
    if document["chosen"] != PLAIN_NAME and chosen is not None and chosen["speedup"] is not None:
        speedup = chosen["speedup"]
        text = (
            f"{document['chosen']} is {speedup['median']:.2f} times as fast as plain decoding "
            f"(95% interval {speedup['low']:.2f}-{speedup['high']:.2f})"
        )
        for category in chosen["slower_on"]:
            text += f"; on {category} prompts it is slower ({chosen['categories'][category]['median']:.2f})"
        return text + busy
    tried = [row for row in document["rows"] if row.get("speedup") and row["name"] != ENGINE_NAME]
    best = max(tried, key=lambda row: float(row["speedup"]["median"]), default=None)
    if best is None:
        return f"nothing was shown to be faster than plain decoding: no candidate could be run live{busy}"
    return (
        f"nothing was shown to be faster than plain decoding; the best, {best['name']}, came to "
        f"{interval_text(best['speedup'], best['answers'])} in {best['answers']} different answers{busy}"
    )


def server_next_step(document: Mapping[str, Any]) -> str:
    """What the user can do next."""
    live = [row["answers"] for row in document["rows"] if row["name"] != ENGINE_NAME and "answers" in row]
    if document["chosen"] == PLAIN_NAME and max(live, default=0) < FEWEST_ANSWERS:
        return f"No candidate has the {FEWEST_ANSWERS} answers that a winner needs; raise --budget"
    if document["chosen"] == PLAIN_NAME:
        longer = with_budget(str(document["command"]), LONGER * document["budget_s"])
        return f"Run the server without flags that draft. More answers: {longer}, or your own prompts with --workload"
    return f"Flags to add: {shlex.join(document['flags'])}"


def server_rows(document: Mapping[str, Any], most: int | None = None) -> list[list[str]]:
    """The cells of the table, in the order of SERVER_COLUMNS; without `most`, all rows."""
    return [_cells(row, document) for row in document["rows"][:most]]


def level_lines(document: Mapping[str, Any]) -> list[str]:
    """One sentence for each further concurrency."""
    lines = []
    for level, found in document["levels"].items():
        if found["failure"]:
            lines.append(f"{level} at once: {found['name']} failed: {found['failure']}")
        elif found["own"] is not None:
            own = found["own"]
            lines.append(
                f"{level} at once: {found['name']} {interval_text(found['speedup'], found.get('answers'))}, "
                f"{own['tokens_per_second']:.1f} tokens/s for each; first token {_percentiles(own['first_ms'])} ms, "
                f"between two pieces of text {_percentiles(own['gap_ms'])} ms (50th, 95th and 99th percentile)"
            )
        else:
            lines.append(f"{level} at once: there was no time to measure {found['name']}")
    return lines


def _percentiles(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else ", ".join(f"{found[f'p{one}']:.0f}" for one in PERCENTILES)


def _cells(row: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    live = row["live"]

    def two(found: Mapping[str, float] | None) -> str:
        return f"{found['p50']:.0f}, {found['p95']:.0f}" if found is not None else ""

    predicted = row["predicted"]
    return [
        row["name"],
        f"{predicted['speedup']:.2f}" if predicted is not None else "",
        f"{predicted['tokens_per_pass']:.2f}" if predicted is not None else "",
        interval_text(row["speedup"], row["answers"]) if row.get("speedup") else "",
        f"{live['tokens_per_second']:.1f}" if live is not None else "",
        two(live["first_ms"]) if live is not None else "",
        two(live["gap_ms"]) if live is not None else "",
        "chosen" if row["name"] == document["chosen"] and document["chosen"] != PLAIN_NAME else row["state"],
    ]


def _described(document: Mapping[str, Any]) -> str:
    name = document["abilities"]["kind"]
    return f"{name}, plain decoding" if document["chosen"] == PLAIN_NAME else f"{name}, {document['chosen']}"


def _live_row(run: CandidateRun, findings: ServerFindings) -> dict[str, Any]:
    return {
        **_replayed_row(run.candidate, findings),
        "speedup": _interval(run),
        "answers": len(run.judged.groups),
        "slower_on": run.judged.slow_categories(),
        "live": _speeds(run.own),
        "categories": {
            category: {**interval.as_mapping(), "answers": len(run.judged.answers[category])}
            for category in run.judged.answers
            if (interval := run.judged.speedup(category)) is not None
        },
        "state": _live_state(run),
        **({"failure": run.failure} if run.failure is not None else {}),
    }


def _live_state(run: CandidateRun) -> str:
    """What became of a candidate that was to run live; what its answers say comes before when it was dropped."""
    if run.failure is not None:
        return f"failed: {run.failure}"
    if not run.own:
        return "no time to run it"
    if run.candidate.name == ENGINE_NAME:
        return "specplug's own engine"
    if run.wins:
        return ", ".join(["faster", *(f"slower on {category} prompts" for category in run.judged.slow_categories())])
    return run.judged.why_not_faster() or run.dropped or "not the best of the selection"


def _replayed_row(candidate: Candidate, findings: ServerFindings) -> dict[str, Any]:
    known = findings.predictions.get(candidate.name)
    shown = None
    if known is not None:
        replay = known.replay
        shown = {
            "speedup": round(known.speedup, 4),
            "tokens_per_pass": round((replay.accepted + replay.num_passes) / max(1, replay.num_passes), 4),
            "drafted": replay.drafted,
            "accepted": replay.accepted,
        }
    return {
        "name": candidate.name,
        "flags": list(candidate.flags),
        "predicted": shown,
        "live": None,
        "state": "replayed" if known is not None else "not tried",
    }


def _interval(run: CandidateRun) -> dict[str, float] | None:
    speedup = run.speedup
    return speedup.as_mapping() if speedup is not None else None


def _speeds(answers: Sequence[Timed]) -> dict[str, Any] | None:
    """Speed and latencies of answers; None where there is none."""
    seconds = sum(one.ms for one in answers) / 1000
    if not answers or not seconds:
        return None
    gaps = [gap for one in answers for gap in one.gaps_ms]
    counted = [one for one in answers if one.drafted is not None]
    return {
        "answers": len(answers),
        "tokens_per_second": round(sum(one.tokens for one in answers) / seconds, 2),
        "first_ms": _percentile_mapping([one.first_ms for one in answers]),
        "gap_ms": _percentile_mapping(gaps),
        "drafted": sum(one.drafted or 0 for one in counted) if counted else None,
        "accepted": sum(one.accepted or 0 for one in counted) if counted else None,
    }


def _percentile_mapping(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{one}": round(float(np.percentile(values, one)), 2) for one in PERCENTILES}


def _pass_ms(costs: ServerCosts | None) -> dict[str, list[float]] | None:
    if costs is None:
        return None
    return {"rows": list(costs.times.rows), "ms": [round(one, 3) for one in costs.times.ms]}
