"""Which settings to confirm, when enough was seen, and which one wins.

Knows predictions and measured pairs. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specplug.bench.statistics import Interval, paired_ratio
from specplug.tune.candidates import Setting

CANDIDATES = 3

FEWEST = 5
"""Fewer different answers have no interval worth the name."""

SLOWER = 0.98
"""A category whose whole interval lies below this is one in which a setting is slower than plain decoding."""

WORTH = 1.01
"""A smaller gain is what noise in plain decoding's own figures looks like to all three settings that are tried."""

FEWEST_OF_KIND = 3
"""Of a category: fewer answers say nothing of it alone."""

Totals = list[float]
"""Tokens and seconds; plain decoding's; and those of the engine that drafts while nobody does, 0 where it is none."""


@dataclass(slots=True)
class Pairs:
    """One setting against plain decoding. Repeats of the same answers add up: they are no further sample.

    groups   sums by what was answered together, which is what intervals are drawn from
    answers  by category, sums by answer
    looks    times that an answer of a category was measured
    """

    groups: dict[str, Totals] = field(default_factory=dict)
    answers: dict[str, dict[str, Totals]] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)

    def add(self, group: str, kind: str, answer: str, values: Sequence[float]) -> None:
        """One answer's tokens and seconds, plain decoding's, and maybe those of the engine at rest."""
        for sums in (
            self.groups.setdefault(group, [0.0] * 6),
            self.answers.setdefault(kind, {}).setdefault(answer, [0.0] * 6),
        ):
            for i, value in enumerate(values):
                sums[i] += value
        self.looks[kind] = self.looks.get(kind, 0) + 1

    def speedup(self, kind: str | None = None) -> Interval | None:
        """Over all groups, or over the answers of one category; None where nothing has tokens."""
        return _ratio(self._lines(kind), (0, 1), (2, 3))

    def over_rest(self, kind: str | None = None) -> Interval | None:
        """Over the engine that drafts while nobody does: two processes of one engine may differ for as long as they
        live, which no number of answers shows."""
        return _ratio(self._lines(kind), (0, 1), (4, 5))

    def rest(self) -> Interval | None:
        """That engine over plain decoding."""
        return _ratio(self._lines(None), (4, 5), (2, 3))

    def totals(self, kind: str | None = None) -> Totals:
        lines = self._lines(kind)
        return [sum(column) for column in zip(*lines, strict=True)] if lines else [0.0] * 6

    def against(self) -> str | None:
        """Why this is not shown to be faster than plain decoding, and than an engine at rest; None where it is."""
        overall = self.speedup()
        if overall is None or len(self.groups) < FEWEST:
            return f"too few different answers: {len(self.groups)}, {FEWEST} are needed"
        if overall.low <= 1.0 or overall.median < WORTH:
            return "not faster" if overall.median < WORTH else "not shown to be faster"
        own = self.over_rest()
        if own is not None and (own.low <= 1.0 or own.median < WORTH):
            return f"not shown to be faster than an engine at rest ({own.median:.2f})"
        slow = self.slow_kinds()
        return f"slower at {', '.join(slow)}" if slow else None

    def slow_kinds(self) -> list[str]:
        """Categories in which plain decoding, or an engine at rest, is faster outside the noise."""
        return [
            kind
            for kind, answers in self.answers.items()
            if len(answers) >= FEWEST_OF_KIND
            and any(seen is not None and seen.high < SLOWER for seen in (self.speedup(kind), self.over_rest(kind)))
        ]

    def is_slower(self) -> bool:
        """Whether plain decoding, or an engine at rest, is faster outside the noise over all."""
        return any(seen is not None and seen.high < 1.0 for seen in (self.speedup(), self.over_rest()))

    def _lines(self, kind: str | None) -> list[Totals]:
        return list((self.groups if kind is None else self.answers.get(kind, {})).values())


def _ratio(found: Sequence[Totals], own: tuple[int, int], base: tuple[int, int]) -> Interval | None:
    """Tokens per second over those of a base, both named by their places in the sums; None where one has no tokens."""
    lines = [sums for sums in found if min(sums[own[0]], sums[base[0]]) > 0]
    if not lines:
        return None
    columns = [list(column) for column in zip(*lines, strict=True)]
    return paired_ratio(*(columns[place] for place in (*own, *base)))


def candidates(predicted: Mapping[Setting, float], count: int = CANDIDATES) -> list[Setting]:
    """The settings to confirm: the best of each method first, best methods first, then the next best of any."""
    ranked = sorted(predicted, key=lambda setting: -predicted[setting])
    methods: dict[str, Setting] = {}
    for setting in ranked:
        methods.setdefault(setting.method, setting)
    chosen = list(methods.values())[:count]
    chosen += [setting for setting in ranked if setting not in chosen][: count - len(chosen)]
    return sorted(chosen, key=lambda setting: -predicted[setting])


def still_open(pairs: Mapping[Setting, Pairs], kinds: Sequence[str]) -> list[Setting]:
    """The settings that more pairs could still make the winner.

    Out: what plain decoding or an engine at rest beats outside the noise, and what the leader does. Nothing is out
    before every one of `kinds` was looked at twice.
    """
    if any(line.looks.get(kind, 0) < 2 for line in pairs.values() for kind in kinds):
        return list(pairs)
    seen = {setting: line.speedup() for setting, line in pairs.items()}
    known = {setting: interval for setting, interval in seen.items() if interval is not None}
    best_low = max((interval.low for interval in known.values()), default=1.0)
    return [
        setting for setting, interval in known.items() if interval.high >= best_low and not pairs[setting].is_slower()
    ]


def separated(pairs: Mapping[Setting, Pairs], open_: Sequence[Setting]) -> bool:
    """Whether more pairs cannot change the outcome: nothing is left, or one that is shown to be faster."""
    return not open_ or (len(open_) == 1 and pairs[open_[0]].against() is None)


def winners(pairs: Mapping[Setting, Pairs]) -> list[Setting]:
    """Those that nothing speaks against, the fastest first."""
    fast = {setting: line.speedup() for setting, line in pairs.items() if line.against() is None}
    medians = {setting: interval.median for setting, interval in fast.items() if interval is not None}
    return sorted(medians, key=lambda setting: -medians[setting])
