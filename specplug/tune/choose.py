"""Which settings to confirm, when enough was seen, and which one wins.

Knows predictions and measured pairs. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specplug.bench.statistics import Interval, paired_ratio
from specplug.tune.settings import Setting

CANDIDATES = 3

FEWEST_PAIRS = 4
"""Fewer pairs have no interval worth the name."""

SLOWER = 0.98
"""A category whose whole interval lies below this is one in which a setting is slower than plain decoding."""


@dataclass(slots=True)
class Pairs:
    """One setting against plain decoding, group of answers by group: tokens and seconds of both."""

    kinds: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    plain_tokens: list[int] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)

    def add(self, kind: str, own: tuple[int, float], plain: tuple[int, float]) -> None:
        self.kinds.append(kind)
        self.tokens.append(own[0])
        self.seconds.append(own[1])
        self.plain_tokens.append(plain[0])
        self.plain_seconds.append(plain[1])

    def speedup(self, kind: str | None = None) -> Interval | None:
        """Of all pairs, or of one category; None where no pair has tokens."""
        which = [i for i, of in enumerate(self.kinds) if kind in (None, of)]
        which = [i for i in which if min(self.tokens[i], self.plain_tokens[i]) > 0]
        if not which:
            return None
        return paired_ratio(
            [self.tokens[i] for i in which],
            [self.seconds[i] for i in which],
            [self.plain_tokens[i] for i in which],
            [self.plain_seconds[i] for i in which],
        )

    @property
    def faster(self) -> bool:
        """Whether it beats plain decoding outside the noise, and loses to it in no category outside the noise."""
        overall = self.speedup()
        if overall is None or len(self.kinds) < FEWEST_PAIRS or overall.low <= 1.0:
            return False
        return not self.slow_kinds()

    def slow_kinds(self) -> list[str]:
        """Categories with pairs enough to say that plain decoding is faster there."""
        found = []
        for kind in dict.fromkeys(self.kinds):
            interval = self.speedup(kind)
            if interval is not None and self.kinds.count(kind) >= FEWEST_PAIRS and interval.high < SLOWER:
                found.append(kind)
        return found


def candidates(predicted: Mapping[Setting, float], count: int = CANDIDATES) -> list[Setting]:
    """The settings to confirm: the best of each method first, best methods first, then the next best of any."""
    ranked = sorted(predicted, key=lambda setting: -predicted[setting])
    methods: dict[str, Setting] = {}
    for setting in ranked:
        methods.setdefault(setting.method, setting)
    chosen = list(methods.values())[:count]
    chosen += [setting for setting in ranked if setting not in chosen][: count - len(chosen)]
    return sorted(chosen, key=lambda setting: -predicted[setting])


def still_open(pairs: Mapping[Setting, Pairs], kinds: int) -> list[Setting]:
    """The settings that more pairs could still make the winner.

    Out: what plain decoding beats outside the noise, and what the leader does. Nothing is out before every one of the
    `kinds` categories was seen twice.
    """
    if any(len(line.kinds) < max(FEWEST_PAIRS, 2 * kinds) for line in pairs.values()):
        return list(pairs)
    seen = {setting: line.speedup() for setting, line in pairs.items()}
    known = {setting: interval for setting, interval in seen.items() if interval is not None}
    best_low = max((interval.low for interval in known.values()), default=1.0)
    return [setting for setting, interval in known.items() if interval.high >= max(1.0, best_low)]


def separated(pairs: Mapping[Setting, Pairs], open_: Sequence[Setting]) -> bool:
    """Whether more pairs cannot change the outcome: nothing is left, or one that is faster outside the noise."""
    return not open_ or (len(open_) == 1 and pairs[open_[0]].faster)


def winner(pairs: Mapping[Setting, Pairs]) -> Setting | None:
    """The fastest of those that beat plain decoding outside the noise; None where plain decoding is the answer."""
    fast = {setting: line.speedup() for setting, line in pairs.items() if line.faster}
    medians = {setting: interval.median for setting, interval in fast.items() if interval is not None}
    return max(medians, key=medians.__getitem__) if medians else None
