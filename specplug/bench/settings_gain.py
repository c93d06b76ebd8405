"""What engine settings alone give, and what drafting gives on top: the `engine_settings` of `bench --json`.

Works on the figures of arms. Measures nothing, and does not depend on an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specplug.bench.arms import Arm
from specplug.bench.interleaved import Tally
from specplug.bench.statistics import Interval, paired_ratio


@dataclass(frozen=True, slots=True)
class ArmSettings:
    """The engine settings of the arms, in words; `arms[0]` is plain decoding under the best of them.

    labels       one per arm
    profiles     index of plain decoding under the profiles' own settings
    stock        index of plain decoding under llama.cpp's defaults; None where that was not run
    stock_label  llama.cpp's defaults
    """

    labels: Sequence[str]
    profiles: int
    stock: int | None
    stock_label: str


def settings_document(settings: ArmSettings, arms: Sequence[Arm], overall: Sequence[Tally]) -> dict[str, Any]:
    """The `engine_settings` of a document. Intervals are None where nothing was measured.

    settings_speedup   the time of whole requests under llama.cpp's defaults, divided by that of arms[0]
    drafting_arm       the profile with the highest speedup over arms[0]; None where no profile drafts
    drafting_speedup   its speedup, for the tokens after the first
    profiles_slowdown  the time of a plain token under the profiles' settings, divided by that of arms[0]
    """
    alone = None if settings.stock is None else whole_request_ratio(overall[0], overall[settings.stock])
    own = overall[settings.profiles].speedup
    slowdown = Interval(1 / own.median, 1 / own.high, 1 / own.low) if own else None
    speedups = {
        arm.name: tally.speedup
        for arm, tally in zip(arms, overall, strict=True)
        if arm.profile not in (None, "none") and tally.speedup
    }
    name = max(speedups, key=lambda name: speedups[name].median, default=None)
    return {
        "plain": settings.labels[0],
        "profiles": settings.labels[settings.profiles],
        "stock": settings.stock_label,
        "settings_speedup": alone.as_mapping() if alone else None,
        "drafting_arm": name,
        "drafting_speedup": speedups[name].as_mapping() if name else None,
        "profiles_slowdown": slowdown.as_mapping() if slowdown else None,
    }


def whole_request_ratio(fast: Tally, slow: Tally) -> Interval | None:
    """The time of whole requests of `slow`, divided by that of `fast`; None where a prefill was not measured.

    Each pair of answers counts with the number of tokens of `fast`, since rounding can make one of them longer.
    """
    fast_prompts, slow_prompts = fast.measured_prompts, slow.measured_prompts
    if fast_prompts is None or slow_prompts is None:
        return None
    fast_seconds = [prompt + rest for prompt, rest in zip(fast_prompts, fast.seconds, strict=True)]
    slow_seconds = [
        prompt + rest * tokens / max(1, own)
        for prompt, rest, own, tokens in zip(slow_prompts, slow.seconds, slow.tokens, fast.tokens, strict=True)
    ]
    both = [min(pair) for pair in zip(fast.tokens, slow.tokens, strict=True)]  # an answer without tokens is left out
    return paired_ratio(both, fast_seconds, both, slow_seconds, fast.groups) if any(both) else None
