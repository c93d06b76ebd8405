"""What a tune found, in words and rows of tables, from its document. This module measures and computes nothing new."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from specplug.planning.request_time import ALL_ROWS
from specplug.profile import user_folder
from specplug.tune.budget import with_budget
from specplug.tune.candidates import PLAIN
from specplug.tune.selection import FEWEST_ANSWERS

LONGER = 4
"""So many times the budget is advised where it did not decide."""


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
