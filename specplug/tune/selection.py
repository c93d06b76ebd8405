"""Selects the settings to confirm, decides when enough was measured, and selects the winner.

This module depends on predictions and on paired measurements, not on an engine.

Where plain decoding has an engine of its own, a setting is also compared with the idle engine: the engine that drafts,
with drafting disabled. Two processes of one engine can differ in speed for as long as they live, and no number of
answers shows that such a difference does not come from drafts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specplug.bench.statistics import Interval, paired_ratio
from specplug.tune.candidates import BUILTIN_METHOD, Setting

FINALISTS = 3
"""Settings that are confirmed."""

FEWEST_ANSWERS = 5
"""Fewer different answers are too few for an interval, so a setting cannot win with them."""

SLOWER = 0.98
"""A setting counts as slower in a category when the complete interval of its speedup there lies below this."""

LEAST_GAIN = 1.01
"""Smallest median speedup that can win. All finalists are compared with the same measurements of plain decoding, so
noise in those looks like a small gain of every finalist."""

FEWEST_IN_CATEGORY = 3
"""A category with fewer answers is not judged by itself."""

Totals = list[float]
"""Tokens and seconds of a setting, of plain decoding, and of the idle engine (0 where there is none)."""


@dataclass(slots=True)
class Pairs:
    """One setting measured against plain decoding. Repeats of an answer are added up: they do not enlarge the sample.

    groups    sums by group of answers that ran together; intervals are drawn from these
    answers   sums by answer, by category
    measured  how many times an answer of a category was measured
    expanded  whether intervals are widened for few groups and drawn within categories, as `paired_ratio` says; of
              groups of several answers, which may mix categories, only the first
    """

    groups: dict[str, Totals] = field(default_factory=dict)
    answers: dict[str, dict[str, Totals]] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)
    expanded: bool = False

    def add(self, group: str, category: str, answer: str, values: Sequence[float]) -> None:
        """Add one answer: tokens and seconds of the setting, of plain decoding, and of the idle engine if measured."""
        for sums in (
            self.groups.setdefault(group, [0.0] * 6),
            self.answers.setdefault(category, {}).setdefault(answer, [0.0] * 6),
        ):
            for i, value in enumerate(values):
                sums[i] += value
        self.measured[category] = self.measured.get(category, 0) + 1

    def speedup(self, category: str | None = None) -> Interval | None:
        """Over plain decoding, in all groups or in the answers of one category; None where nothing has tokens."""
        return self._ratio(category, (0, 1), (2, 3))

    def speedup_over_idle(self, category: str | None = None) -> Interval | None:
        """Over the idle engine; None where it was not measured."""
        return self._ratio(category, (0, 1), (4, 5))

    def idle_speedup(self) -> Interval | None:
        """Of the idle engine over plain decoding; None where it was not measured."""
        return self._ratio(None, (4, 5), (2, 3))

    def totals(self, category: str | None = None) -> Totals:
        lines = self._lines(category)
        return [sum(column) for column in zip(*lines, strict=True)] if lines else [0.0] * 6

    def why_rejected(self) -> str | None:
        """Why this cannot win: it was not shown to be faster, or is slower in a category; None where it can."""
        if (reason := self.why_not_faster()) is not None:
            return reason
        slow = self.slow_categories()
        return f"slower on {', '.join(slow)} prompts" if slow else None

    def why_not_faster(self) -> str | None:
        """Why this was not shown to be faster than plain decoding and the idle engine; None where it was shown."""
        overall = self.speedup()
        if overall is None or len(self.groups) < FEWEST_ANSWERS:
            return f"too few different answers: {len(self.groups)}, {FEWEST_ANSWERS} are needed"
        if overall.low <= 1.0 or overall.median < LEAST_GAIN:
            return "not faster" if overall.median < LEAST_GAIN else "not shown to be faster"
        over_idle = self.speedup_over_idle()
        if over_idle is not None and (over_idle.low <= 1.0 or over_idle.median < LEAST_GAIN):
            return f"not shown to be faster than the same engine with drafting disabled ({over_idle.median:.2f})"
        return None

    def slow_categories(self) -> list[str]:
        """Categories in which plain decoding or the idle engine is faster by more than the noise."""
        return [
            category
            for category, answers in self.answers.items()
            if len(answers) >= FEWEST_IN_CATEGORY
            and any(
                interval is not None and interval.high < SLOWER
                for interval in (self.speedup(category), self.speedup_over_idle(category))
            )
        ]

    def is_slower(self) -> bool:
        """Whether plain decoding or the idle engine is faster in total by more than the noise."""
        return any(
            interval is not None and interval.high < 1.0 for interval in (self.speedup(), self.speedup_over_idle())
        )

    def _lines(self, category: str | None) -> list[Totals]:
        return list((self.groups if category is None else self.answers.get(category, {})).values())

    def _ratio(self, category: str | None, own: tuple[int, int], base: tuple[int, int]) -> Interval | None:
        """Tokens per second relative to a base; `own` and `base` are the indices of (tokens, seconds) in each total.

        None where no total has tokens of both.
        """
        lines = [("", line) for line in self._lines(category)]
        kinds_known = self.expanded and category is None and len(lines) == sum(map(len, self.answers.values()))
        if kinds_known:
            lines = [(kind, line) for kind, answers in self.answers.items() for line in answers.values()]
        usable = [(kind, total) for kind, total in lines if min(total[own[0]], total[base[0]]) > 0]
        if not usable:
            return None
        columns = [list(column) for column in zip(*(total for _, total in usable), strict=True)]
        kinds = [kind for kind, _ in usable] if kinds_known else ()
        return paired_ratio(*(columns[index] for index in (*own, *base)), expanded=self.expanded, kinds=kinds)


def select_finalists(predicted: Mapping[Setting, float], count: int = FINALISTS) -> list[Setting]:
    """The settings to confirm: the best of each method, best methods first, then the next best of any method.

    Of the engine's own drafter there is one at most, because each setting of it needs an engine of its own.
    """
    ranked = sorted(predicted, key=lambda setting: -predicted[setting])
    methods: dict[str, Setting] = {}
    for setting in ranked:
        methods.setdefault(setting.method, setting)
    chosen = list(methods.values())[:count]
    others = [setting for setting in ranked if setting not in chosen and setting.method != BUILTIN_METHOD]
    chosen += others[: count - len(chosen)]
    return sorted(chosen, key=lambda setting: -predicted[setting])


def undecided(pairs: Mapping[Setting, Pairs], categories: Sequence[str]) -> list[Setting]:
    """The settings that could still win with more measurements.

    A setting is out when plain decoding, the idle engine or the leading setting is faster by more than the noise. No
    setting is out before every one of the categories was measured twice.
    """
    if any(line.measured.get(category, 0) < 2 for line in pairs.values() for category in categories):
        return list(pairs)
    speedups = {setting: line.speedup() for setting, line in pairs.items()}
    known = {setting: interval for setting, interval in speedups.items() if interval is not None}
    best_low = max((interval.low for interval in known.values()), default=1.0)
    return [
        setting for setting, interval in known.items() if interval.high >= best_low and not pairs[setting].is_slower()
    ]


def is_decided(pairs: Mapping[Setting, Pairs], open_: Sequence[Setting]) -> bool:
    """Whether more measurements cannot change the outcome: no setting is open, or one that was shown to be faster."""
    return not open_ or (len(open_) == 1 and pairs[open_[0]].why_rejected() is None)


def select_winners(pairs: Mapping[Setting, Pairs]) -> list[Setting]:
    """The settings that are not rejected, fastest first."""
    fast = {setting: line.speedup() for setting, line in pairs.items() if line.why_rejected() is None}
    medians = {setting: interval.median for setting, interval in fast.items() if interval is not None}
    return sorted(medians, key=lambda setting: -medians[setting])
