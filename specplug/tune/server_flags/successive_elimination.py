"""Runs candidates live, each in pairs with plain decoding: selects one, and confirms it with answers of its own.

Knows questions, replies and intervals; starts servers through LiveServers, and keeps nothing on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import exp, log

from specplug.bench.statistics import Interval
from specplug.errors import SpecplugError
from specplug.subjects.subject import RefusedQuestion, Subject, SubjectError
from specplug.tune.selection import FEWEST_ANSWERS, Pairs
from specplug.tune.server_flags.live_answers import answers_of, plain_answers
from specplug.tune.server_flags.live_servers import LiveServers
from specplug.tune.server_flags.recorded_questions import AskedQuestion, Timed
from specplug.tune.server_flags.server_candidates import PLAIN_NAME, Candidate

FINALISTS = 3
"""So many go on after each has been measured with FEWEST_ANSWERS answers, those of which most is expected."""

PREDICTION_DEVIATION = 0.043
"""Standard deviation of the logarithm of a predicted speedup over a live one: the median error was 0.029
(docs/lab-book/tuning.md#tuning-a-server)."""

SELECTION_SHARE, PREDICTED_SHARE = 0.5, 0.25
"""Of the time, so much the selection has; the second where all its candidates have predictions. It only chooses what is
confirmed, and predictions say more about that than a few answers."""

SELECTION_ROUNDS = 2
"""Most rounds of the selection over all questions."""

CONFIRMATION_ROUNDS = 2
"""Rounds of the confirmation over all questions, as far as the time goes. They do not depend on what the answers say:
who looks in between and stops where the interval is narrow has too narrow intervals."""

START, ANSWER = "start", "answer"
"""What takes time, by server."""


@dataclass(slots=True)
class CandidateRun:
    """A candidate, and what was measured of it.

    predicted     its speedup by replay; None where it was not replayed
    pairs         answers of the selection
    confirmation  later ones, which alone decide whether it wins: those of the selection are the best of several
                  candidates, so they look faster than the candidate is. None where it was not confirmed
    failure       why its server could not be measured
    dropped       why it is not measured any more
    own, plain    answers of its server, and those of plain decoding beside them
    groups        measured so far, of the confirmation once that has begun
    """

    candidate: Candidate
    predicted: float | None = None
    pairs: Pairs = field(default_factory=lambda: Pairs(expanded=True))
    confirmation: Pairs | None = None
    own: list[Timed] = field(default_factory=list)
    plain: list[Timed] = field(default_factory=list)
    failure: str | None = None
    dropped: str | None = None
    groups: int = 0

    def add(self, group: Sequence[AskedQuestion], own: Sequence[Timed], plain: Sequence[Timed]) -> None:
        """A group of answers that were asked at once, of the candidate and of plain decoding."""
        name = " ".join(one.key for one in group)
        for one, mine, theirs in zip(group, own, plain, strict=True):
            self.judged.add(name, one.category, one.key, [*mine.values, *theirs.values, 0.0, 0.0])
        self.own += own
        self.plain += plain
        self.groups += 1

    def begin_confirmation(self) -> None:
        """From here on, answers are those of the confirmation; without effect where it has begun."""
        if self.confirmation is None:
            self.confirmation = Pairs(expanded=True)
            self.groups = 0

    @property
    def judged(self) -> Pairs:
        """The answers by which it is judged."""
        return self.pairs if self.confirmation is None else self.confirmation

    @property
    def speedup(self) -> Interval | None:
        return self.judged.speedup()

    @property
    def median(self) -> float:
        """Of the speedup; 0 where nothing was measured."""
        speedup = self.speedup
        return speedup.median if speedup is not None else 0.0

    @property
    def expected(self) -> float:
        """The speedup to expect by prediction and selection together; the median where there is no prediction.

        The mean of both logarithms, each weighted by the inverse of its variance: a few live answers say less than a
        replay of all recorded ones.
        """
        live = self.pairs.speedup()
        if self.predicted is None or live is None:
            return self.predicted or self.median
        deviation = log(live.high / live.low) / 3.92  # a 95% interval has 3.92 standard deviations
        if not deviation:
            return self.predicted if len(self.pairs.groups) < FEWEST_ANSWERS else live.median
        weights = PREDICTION_DEVIATION**-2, deviation**-2
        return exp((weights[0] * log(self.predicted) + weights[1] * log(live.median)) / sum(weights))

    @property
    def running(self) -> bool:
        return self.failure is None and self.dropped is None

    @property
    def wins(self) -> bool:
        """Whether its confirmation shows that it is faster than plain decoding over the workload.

        In a category it may be slower: a server has the same flags for all, and the result names the category.
        """
        return self.running and self.confirmation is not None and self.confirmation.why_not_faster() is None


Store = Callable[[CandidateRun, Sequence[AskedQuestion], Sequence[Timed], Sequence[Timed]], object]


class SuccessiveElimination:
    """Selects one candidate in rounds, then confirms it with answers of its own.

    Each server of a round is a new process.

    No process that drafts is asked the same question twice, because some methods draft from earlier answers.
    """

    def __init__(
        self,
        servers: LiveServers,
        groups: Sequence[Sequence[AskedQuestion]],
        *,
        left: Callable[[], float],
        start_s: float,
        group_s: float,
        store: Store = lambda run, group, own, plain: None,
        failed: Callable[[CandidateRun], object] = lambda run: None,
        refused: Callable[[Sequence[AskedQuestion], RefusedQuestion], object] = lambda group, error: None,
        progress: Callable[[Sequence[CandidateRun]], object] = lambda runs: None,
    ) -> None:
        """
        groups   questions that are asked at once, in the order in which they are taken
        left     returns the seconds that remain
        start_s, group_s
                 estimates: seconds to start a server, and for a group of both servers; what was measured replaces them
        store    receives each measured group; failed, a candidate that failed
        refused  receives each group that plain decoding refuses; it is left out from then on
        """
        self._servers = servers
        self._groups = list(groups)
        self._left = left
        self._start_s = start_s
        self._group_s = group_s
        self._longest: dict[tuple[str, str], float] = {}
        self._kept_back = 0.0
        self._store = store
        self._failed = failed
        self._refused = refused
        self._progress = progress

    def run(self, runs: Sequence[CandidateRun]) -> None:
        """Measure them: afterwards one of them wins, or none. A confirmation that has begun goes on."""
        if all(run.confirmation is None for run in runs):
            self._select(runs)
        while (leader := leader_of(runs)) is not None:
            self._confirm(leader, runs)
            if leader.failure is None:
                return

    def measure(self, run: CandidateRun, groups: Sequence[Sequence[AskedQuestion]]) -> None:
        """Measure groups with a new server of the candidate and with plain decoding at about the same time, as far as
        the time goes.

        A fault of its server is its result. SpecplugError where plain decoding fails.
        """
        try:
            if self._servers.together:
                self._side_by_side(run, groups)
            if not self._servers.together:
                self._one_at_a_time(run, groups)
        except SubjectError as error:
            run.failure = str(error)
            self._failed(run)

    def _select(self, runs: Sequence[CandidateRun]) -> None:
        """Drop candidates until one is left, each was measured often enough, or the time for it is over."""
        self._kept_back = (1 - selection_share(run.predicted is not None for run in runs)) * self._left()
        size = min(len(self._groups), FEWEST_ANSWERS)
        while True:
            drop(runs)
            running = [run for run in runs if run.running]
            open_ = [run for run in running if run.groups < SELECTION_ROUNDS * len(self._groups)]
            if len(running) < 2 or not open_:
                return
            measured = False
            for run in open_:
                done, count = run.groups, len(self._groups)
                if not count:
                    return
                at = done % count
                self.measure(run, self._groups[at : at + size])
                measured |= not run.running or run.groups != done or len(self._groups) != count
                self._progress(runs)
            if not measured:
                return  # there is no time left
            size = min(len(self._groups), 2 * size)

    def _confirm(self, run: CandidateRun, runs: Sequence[CandidateRun]) -> None:
        """Measure one candidate anew, first with the questions that did not select it: it may be the best for those."""
        run.begin_confirmation()
        self._kept_back = 0.0
        used = len(run.pairs.groups) % max(1, len(self._groups))
        groups = [*self._groups[used:], *self._groups[:used]]
        while run.running and run.groups < CONFIRMATION_ROUNDS * len(groups):
            done, count = run.groups, len(groups)
            self.measure(run, groups[done % count :])
            self._progress(runs)
            groups = [one for one in groups if one in self._groups]
            if run.groups == done and len(groups) == count:
                return

    def _side_by_side(self, run: CandidateRun, groups: Sequence[Sequence[AskedQuestion]]) -> None:
        """Each group with both servers, by turns in either order; none where they turn out not to fit together."""
        if not self._fits(self._start_of(run) + self._both_of(run)):
            return
        with self._other(run) as other:
            for group in groups if self._servers.together else ():
                if not self._fits(self._both_of(run)):
                    return
                first = self._plain_answers(group) if run.groups % 2 else None
                if run.groups % 2 and first is None:
                    continue
                own = self._own_or_refusal(run, other, group)
                plain = first or self._plain_answers(group)
                if plain is not None:
                    self._keep(run, group, own, plain)

    def _one_at_a_time(self, run: CandidateRun, groups: Sequence[Sequence[AskedQuestion]]) -> None:
        """Where memory holds one server: half of the groups with the candidate, all with plain decoding, then the other
        half with the candidate. So a machine that becomes slower all the time slows both equally."""
        early: list[list[Timed] | RefusedQuestion] = []
        late: list[tuple[Sequence[AskedQuestion], list[Timed]]] = []
        first, second = groups[: (len(groups) + 1) // 2], groups[(len(groups) + 1) // 2 :]
        if not self._fits(self._start_of(run) + self._start_s + self._both_of(run)):
            return
        with self._other(run) as other:
            for group in first:
                # plain decoding has to answer as many
                plain_s = self._start_s + (len(early) + 1) * self._seconds_of(PLAIN_NAME, ANSWER)
                if not self._fits(self._seconds_of(run.candidate.name, ANSWER) + plain_s):
                    break
                early.append(self._own_or_refusal(run, other, group))
        for group, own in zip(first, early, strict=False):
            if (plain := self._plain_answers(group)) is not None:
                self._keep(run, group, own, plain)
        for group in second:
            own_s = self._start_of(run) + (len(late) + 1) * self._seconds_of(run.candidate.name, ANSWER)
            if len(early) < len(first) or not self._fits(self._seconds_of(PLAIN_NAME, ANSWER) + own_s):
                break
            if (plain := self._plain_answers(group)) is not None:
                late.append((group, plain))
        if not late:
            return
        with self._other(run) as other:
            for group, plain in late:
                if not self._fits(self._seconds_of(run.candidate.name, ANSWER)):
                    return
                self._keep(run, group, self._own_or_refusal(run, other, group), plain)

    def _fits(self, seconds: float) -> bool:
        return self._left() - self._kept_back >= seconds

    def _start_of(self, run: CandidateRun) -> float:
        return self._seconds_of(run.candidate.name, START)

    def _both_of(self, run: CandidateRun) -> float:
        """Seconds for a group, with the candidate and with plain decoding."""
        return self._seconds_of(run.candidate.name, ANSWER) + self._seconds_of(PLAIN_NAME, ANSWER)

    def _seconds_of(self, name: str, what: str) -> float:
        """The longest that a start, or a group, of this server has taken; before that, the estimate, or what the
        fastest other server has taken where that is more."""
        if (known := self._longest.get((name, what))) is not None:
            return known
        others = [seconds for (_, other), seconds in self._longest.items() if other == what]
        return max(self._start_s if what == START else self._group_s / 2, min(others, default=0.0))

    def _took(self, name: str, what: str, before: float) -> None:
        """Keep what it took since there were `before` seconds left."""
        self._longest[name, what] = max(self._longest.get((name, what), 0.0), before - self._left())

    @contextmanager
    def _other(self, run: CandidateRun) -> Iterator[Subject]:
        before, together = self._left(), self._servers.together
        with self._servers.other(run.candidate) as other:
            if self._servers.together == together:  # else it was started twice, and the plain server stopped between
                self._took(run.candidate.name, START, before)
            yield other

    def _own_or_refusal(
        self, run: CandidateRun, other: Subject, group: Sequence[AskedQuestion]
    ) -> list[Timed] | RefusedQuestion:
        """A refusal is a fault only where plain decoding answers."""
        before = self._left()
        try:
            own = answers_of(other, group)
        except RefusedQuestion as error:
            return error
        except SpecplugError as error:  # such as a prompt that is too long for specplug's own engine
            raise error if isinstance(error, SubjectError) else SubjectError(str(error)) from error
        self._took(run.candidate.name, ANSWER, before)
        return own

    def _plain_answers(self, group: Sequence[AskedQuestion]) -> list[Timed] | None:
        """None where it refuses one of the questions: then nobody is asked the group again."""
        with suppress(SubjectError):  # which comes again below
            self._servers.plain()  # its start does not count as an answer
        before = self._left()
        try:
            plain = plain_answers(self._servers, group)
        except RefusedQuestion as error:
            self._groups = [one for one in self._groups if one != group]
            self._refused(group, error)
            return None
        self._took(PLAIN_NAME, ANSWER, before)
        return plain

    def _keep(
        self,
        run: CandidateRun,
        group: Sequence[AskedQuestion],
        own: Sequence[Timed] | RefusedQuestion,
        plain: Sequence[Timed],
    ) -> None:
        """Raises what the candidate refused."""
        if isinstance(own, RefusedQuestion):
            raise own
        run.add(group, own, plain)
        self._store(run, group, own, plain)


def selection_share(predicted: Iterable[bool]) -> float:
    """The share of the time for the selection of candidates, given which of them have a prediction."""
    return PREDICTED_SHARE if all(predicted) else SELECTION_SHARE


def drop(runs: Sequence[CandidateRun]) -> None:
    """Drop candidates whose interval lies below that of the leading one or below plain decoding, and all but FINALISTS.

    Only those with FEWEST_ANSWERS groups are compared.
    """
    known = [
        (run, speedup)
        for run in runs
        if run.running and len(run.pairs.groups) >= FEWEST_ANSWERS and (speedup := run.speedup) is not None
    ]
    leading = max((speedup.low for _, speedup in known), default=1.0)
    for run, speedup in known:
        if speedup.high < 1.0:
            run.dropped = "slower than plain decoding"
        elif speedup.high < leading:
            run.dropped = "slower than another one"
    ranked = sorted((run for run, _ in known if run.running), key=lambda run: run.expected, reverse=True)
    for run in ranked[FINALISTS:]:
        run.dropped = f"not among the best {FINALISTS} of the selection"


def leader_of(runs: Sequence[CandidateRun]) -> CandidateRun | None:
    """The candidate to confirm: the one whose confirmation has begun, else that of which most is expected.

    Those with too few answers come last.
    """
    running = [run for run in runs if run.running]
    return max(
        running,
        key=lambda one: (one.confirmation is not None, min(len(one.pairs.groups), FEWEST_ANSWERS), one.expected),
        default=None,
    )
