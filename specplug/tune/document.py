"""The document of `tune --json`, and what of it a profile keeps as evidence.

Knows plain data. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specplug.tune.choose import Pairs
from specplug.tune.replay import Prediction, Sums
from specplug.tune.settings import Setting

KEPT = 8
"""Settings in a profile's evidence, beside those that were confirmed, the best of each method under each mode of the
planner, and the worst."""


def predicted_figures(prediction: Prediction) -> dict[str, Any]:
    """Plain data: overall and by category; `accepted_at` is the share of drafts of at least that length that were
    accepted so far."""
    kinds = prediction.by_category()
    return {**_sums(prediction.total), "categories": {kind: _sums(sums) for kind, sums in kinds.items()}}


def confirmed_figures(pairs: Pairs) -> dict[str, Any]:
    """Plain data: pairs, tokens per second and speedup, overall and by category."""
    return {**_pairs(pairs, None), "categories": {kind: _pairs(pairs, kind) for kind in dict.fromkeys(pairs.kinds)}}


def setting_line(setting: Setting, prediction: Prediction, confirmed: Mapping[int, Pairs]) -> dict[str, Any]:
    """One setting with all that is known of it; `confirmed` by concurrency."""
    return {
        "name": setting.name,
        "method": setting.method,
        "mode": setting.planner.mode,
        "predicted": predicted_figures(prediction),
        "confirmed": {str(level): confirmed_figures(pairs) for level, pairs in confirmed.items()},
    }


def errors(document: Mapping[str, Any]) -> list[float]:
    """|predicted / confirmed - 1| of every setting that was confirmed at the deciding concurrency."""
    level = str(document["level"])
    found = []
    for line in document["settings"]:
        speedup = (line["confirmed"].get(level) or {}).get("speedup")
        if speedup:
            found.append(abs(line["predicted"]["speedup"] / speedup["median"] - 1))
    return found


def evidence(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with fewer settings, for the profile: the last, which loses most, is always among them."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for place, line in enumerate(document["settings"]):
        kind = (line["method"], line["mode"])
        if place < KEPT or line["confirmed"] or kind not in seen or place == len(document["settings"]) - 1:
            kept.append(line)
        seen.add(kind)
    return {**document, "settings": kept, "settings_left_out": len(document["settings"]) - len(kept)}


def verdict(document: Mapping[str, Any]) -> str:
    """The outcome in one line."""
    level = str(document["level"])
    if document["chosen"] == "none":
        tried = [line for line in document["settings"] if line["confirmed"].get(level)]
        live = [line["confirmed"][level]["speedup"] for line in tried]
        shown = "; ".join(f"{line['name']} {interval_text(one)}" for line, one in zip(tried, live, strict=True))
        if not any(live):
            return "plain decoding: there was no time to try anything live; raise the budget"
        if any(one and one["high"] > 1.0 and one["median"] > 1.0 for one in live):
            return f"plain decoding: nothing was shown to beat it, a larger budget may (tried live: {shown})"
        return f"plain decoding: nothing beats it here (tried live: {shown})"
    line = next(line for line in document["settings"] if line["name"] == document["chosen"])
    return f"{line['name']}: {interval_text(line['confirmed'][level]['speedup'])} of plain decoding"


def interval_text(interval: Mapping[str, float] | None) -> str:
    """For example `1.24 (1.16-1.33)`."""
    return "-" if interval is None else f"{interval['median']:.2f} ({interval['low']:.2f}-{interval['high']:.2f})"


def _sums(sums: Sums) -> dict[str, Any]:
    return {
        "speedup": round(sums.speedup, 4),
        "tokens_per_second": round(1000 * sums.tokens / sums.ms, 2) if sums.ms else None,
        "mean_acceptance_length": round(sums.mean_acceptance_length, 4),
        "drafted_per_step": round(sums.drafted / sums.steps, 3) if sums.steps else 0.0,
        "accepted_at": [
            round(right / offered, 4)
            for right, offered in zip(sums.accepted_at, sums.offered_at, strict=True)
            if offered
        ],
    }


def _pairs(pairs: Pairs, kind: str | None) -> dict[str, Any]:
    interval = pairs.speedup(kind)
    which = [i for i, found in enumerate(pairs.kinds) if kind in (None, found)]
    seconds = sum(pairs.seconds[i] for i in which)
    return {
        "pairs": len(which),
        "tokens_per_second": round(sum(pairs.tokens[i] for i in which) / seconds, 2) if seconds else None,
        "speedup": interval
        and {"median": round(interval.median, 4), "low": round(interval.low, 4), "high": round(interval.high, 4)},
    }
