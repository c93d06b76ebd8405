"""Runs candidates live, each in pairs with plain decoding, and drops those that can no longer win.

Knows questions, replies and intervals; starts servers through LiveServers, and keeps nothing on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

from specplug.bench.statistics import Interval
from specplug.errors import SpecplugError
from specplug.subjects.subject import Question, Subject, SubjectError
from specplug.tune.selection import FEWEST_ANSWERS, Pairs
from specplug.tune.server_flags.live_servers import LiveServers, asked
from specplug.tune.server_flags.recorded_questions import AskedQuestion, Timed, timed
from specplug.tune.server_flags.server_candidates import Candidate

FINALISTS = 3
"""So many are confirmed beside plain decoding."""

MOST_ROUNDS = 4
"""Most rounds over all answers. Repeats do not add answers: more of them would measure the machine, not the work."""

NARROW = 0.06
"""Width of a speedup's interval from which more answers are not needed."""

WARM_TOKENS = 4
"""Of the answer with which a prompt gets into a server's cache. Fewer may have no text yet."""


@dataclass(slots=True)
class Racer:
    """A candidate, and what was measured of it.

    predicted  its speedup by replay; None where it was not replayed
    failure    why its server could not be measured
    dropped    why it is not measured any more
    own, plain answers of its server, and those of plain decoding beside them
    groups     measured so far
    """

    candidate: Candidate
    predicted: float | None = None
    pairs: Pairs = field(default_factory=Pairs)
    own: list[Timed] = field(default_factory=list)
    plain: list[Timed] = field(default_factory=list)
    failure: str | None = None
    dropped: str | None = None
    groups: int = 0

    def add(self, group: Sequence[AskedQuestion], own: Sequence[Timed], plain: Sequence[Timed]) -> None:
        """A group of answers that were asked at once, of the candidate and of plain decoding."""
        name = " ".join(one.key for one in group)
        for one, mine, theirs in zip(group, own, plain, strict=True):
            self.pairs.add(name, one.category, one.key, [*mine.values, *theirs.values, 0.0, 0.0])
        self.own += own
        self.plain += plain
        self.groups += 1

    @property
    def speedup(self) -> Interval | None:
        return self.pairs.speedup()

    @property
    def running(self) -> bool:
        return self.failure is None and self.dropped is None


Store = Callable[[Racer, Sequence[AskedQuestion], Sequence[Timed], Sequence[Timed]], object]


class Race:
    """Measures racers in rounds until the outcome is clear or the time is over.

    Each server of a round is a new process.

    No process is asked the same question twice, because some methods draft from earlier answers.
    """

    def __init__(
        self,
        servers: LiveServers,
        groups: Sequence[Sequence[AskedQuestion]],
        *,
        left: Callable[[], float],
        start_s: float,
        group_s: float,
        store: Store = lambda racer, group, own, plain: None,
        failed: Callable[[Racer], object] = lambda racer: None,
        progress: Callable[[Sequence[Racer]], object] = lambda racers: None,
    ) -> None:
        """
        groups   questions that are asked at once, in the order in which they are taken
        left     returns the seconds that remain
        start_s, group_s
                 estimates: seconds to start a server, and for a group of both servers
        store    receives each measured group; failed, a racer that failed
        """
        self._servers = servers
        self._groups = groups
        self._left = left
        self._start_s = start_s
        self._group_s = group_s
        self._store = store
        self._failed = failed
        self._progress = progress

    def run(self, racers: Sequence[Racer]) -> None:
        """Measure them, and drop those that cannot win any more."""
        size = min(len(self._groups), FEWEST_ANSWERS)
        while True:
            drop(racers)
            open_ = [racer for racer in racers if racer.running]
            if not open_ or is_clear(open_, len(self._groups)):
                return
            for racer in open_:
                if self._left() < self._start_s + self._group_s:
                    return
                at = racer.groups % len(self._groups)
                self.measure(racer, self._groups[at : at + size])
                if racer.groups >= MOST_ROUNDS * len(self._groups):
                    racer.dropped = "every answer was measured as often as is useful"
                self._progress(racers)
            size = min(len(self._groups), 2 * size)

    def measure(self, racer: Racer, groups: Sequence[Sequence[AskedQuestion]]) -> None:
        """Measure groups with a new server of the racer, each at about the same time with plain decoding.

        A fault of the racer's server is its result. SpecplugError where plain decoding fails.
        """
        began = monotonic()
        try:
            with self._servers.other(racer.candidate) as other:
                self._start_s = max(self._start_s, monotonic() - began)
                if not self._servers.together:
                    self._one_after_the_other(racer, groups, other)
                    return
                for group in groups:
                    if self._left() < self._group_s:
                        return
                    began = monotonic()
                    if racer.groups % 2:
                        plain = plain_answers(self._servers, group)
                        own = answers_of(other, group)
                    else:
                        own = answers_of(other, group)
                        plain = plain_answers(self._servers, group)
                    self._group_s = max(self._group_s, monotonic() - began)
                    self._keep(racer, group, own, plain)
        except SubjectError as error:
            racer.failure = str(error)
            self._failed(racer)

    def _one_after_the_other(self, racer: Racer, groups: Sequence[Sequence[AskedQuestion]], other: Subject) -> None:
        """Where memory holds one server: all answers of the racer, then those of plain decoding."""
        measured: list[list[Timed]] = []
        for group in groups:
            if self._left() < self._start_s + self._group_s * (len(measured) + 1):
                break
            measured.append(answers_of(other, group))
        for group, own in zip(groups, measured, strict=False):
            self._keep(racer, group, own, plain_answers(self._servers, group))

    def _keep(self, racer: Racer, group: Sequence[AskedQuestion], own: Sequence[Timed], plain: Sequence[Timed]) -> None:
        racer.add(group, own, plain)
        self._store(racer, group, own, plain)


def drop(racers: Sequence[Racer]) -> None:
    """Drop racers whose interval lies below that of the leading one or below plain decoding, and all but FINALISTS."""
    open_ = [racer for racer in racers if racer.running]
    known = {id(racer): racer.speedup for racer in open_}
    leader = max((one.low for one in known.values() if one is not None), default=1.0)
    for racer in open_:
        speedup = known[id(racer)]
        if speedup is None or len(racer.pairs.groups) < FEWEST_ANSWERS:
            continue
        if speedup.high < 1.0:
            racer.dropped = "slower than plain decoding"
        elif speedup.high < leader:
            racer.dropped = "slower than another one"
    ranked = sorted((racer for racer in racers if racer.running), key=_median, reverse=True)
    for racer in ranked[FINALISTS:]:
        if len(racer.pairs.groups) >= FEWEST_ANSWERS:
            racer.dropped = "not among the finalists"


def is_clear(open_: Sequence[Racer], groups: int) -> bool:
    """Whether one racer remains that was shown to be faster than plain decoding, by an interval that is narrow enough,
    or by every one of the groups."""
    if len(open_) != 1 or open_[0].pairs.why_rejected() is not None:
        return False
    speedup = open_[0].speedup
    narrow = speedup is not None and speedup.high - speedup.low <= NARROW
    return narrow or open_[0].groups >= groups


def answers_of(subject: Subject, group: Sequence[AskedQuestion]) -> list[Timed]:
    """The times of a group of answers, after each prompt was read once: prompt caches are warm in every server."""
    asked(subject, [_shortest(one.question) for one in group])
    return [timed(reply) for reply in asked(subject, [one.question for one in group])]


def plain_answers(servers: LiveServers, group: Sequence[AskedQuestion]) -> list[Timed]:
    """Those of plain decoding; its server is started again once where it fails. SpecplugError where it fails again."""
    try:
        return answers_of(servers.plain(), group)
    except SubjectError:
        try:
            return answers_of(servers.restart_plain(), group)
        except SubjectError as error:
            raise SpecplugError(f"plain decoding cannot be measured: {error}") from None


def _shortest(question: Question) -> Question:
    return replace(question, max_tokens=WARM_TOKENS)


def _median(racer: Racer) -> float:
    speedup = racer.speedup
    return speedup.median if speedup is not None else 0.0
