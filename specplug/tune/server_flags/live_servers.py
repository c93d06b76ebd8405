"""The servers that run at the same time: the plain one, and one with drafts beside it where memory allows.

Knows which process runs and which is asleep, not what is measured with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic

from specplug.errors import SpecplugError
from specplug.subjects.subject import Subject, SubjectError
from specplug.tune.server_flags.server_candidates import PLAIN, Candidate

Opener = Callable[[Candidate], Subject]
"""Makes the subject of a candidate, which is not started."""


class LiveServers:
    """Starts servers as they are needed, and keeps the plain one.

    together       whether memory holds two servers. Where it is not known, such as on a GPU, it shows when a candidate
                   does not start beside the plain one, and starts without it
    plain_start_s  seconds that the first start of the plain one took; 0 before it
    note           receives a sentence where `together` turns out to be wrong
    """

    def __init__(
        self,
        opener: Opener,
        *,
        together: bool,
        clock: Callable[[], float] = monotonic,
        note: Callable[[str], object] = lambda text: None,
    ) -> None:
        """together: else the plain one ends before another starts"""
        self._opener = opener
        self.together = together
        self._plain: Subject | None = None
        self._other: Subject | None = None
        self.note = note
        self.plain_start_s = 0.0
        self._clock = clock

    def plain(self) -> Subject:
        """The running server without drafts, asleep."""
        if self._plain is None:
            if not self.together:
                self._stop_other()
            self._plain = self._started(PLAIN)
        return self._plain

    @contextmanager
    def other(self, candidate: Candidate) -> Iterator[Subject]:
        """The running server of a candidate, asleep; it ends with the block. `together` may be False from then on."""
        if not self.together:
            self._stop_plain()
        self._stop_other()
        try:
            self._other = self._started_beside(candidate)
            yield self._other
        finally:
            self._stop_other()

    def restart_plain(self) -> Subject:
        """A new process in place of one that failed."""
        self._stop_plain()
        return self.plain()

    def close(self) -> None:
        self._stop_other()
        self._stop_plain()

    def _started_beside(self, candidate: Candidate) -> Subject:
        """A candidate that does not start beside the plain server is started once more without it."""
        try:
            return self._started(candidate)
        except SubjectError:
            if self._plain is None:
                raise
        self._stop_plain()
        try:
            alone = self._started(candidate)
        except SubjectError:
            with suppress(SubjectError):  # it comes again when plain decoding is asked
                self.plain()  # before the next candidate, beside which it may not start
            raise
        self.together = False
        self.note(f"one server runs at a time from here on: {candidate.name} did not start beside the plain one")
        return alone

    def _started(self, candidate: Candidate) -> Subject:
        subject = self._opener(candidate)
        began = self._clock()
        try:
            subject.start(candidate.flags)
            subject.sleep()
        except SpecplugError as error:
            subject.stop()
            if candidate == PLAIN or isinstance(error, SubjectError):
                raise
            raise SubjectError(str(error)) from None  # such as a drafter for which there is no memory
        except BaseException:  # whatever it was, the process must not stay
            subject.stop()
            raise
        if candidate == PLAIN and not self.plain_start_s:
            self.plain_start_s = self._clock() - began
        return subject

    def _stop_plain(self) -> None:
        if self._plain is not None:
            self._plain.stop()
            self._plain = None

    def _stop_other(self) -> None:
        if self._other is not None:
            self._other.stop()
            self._other = None
