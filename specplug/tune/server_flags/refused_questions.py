"""The questions that plain decoding refuses, which a tune leaves out, and what the journal keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specplug.errors import SpecplugError
from specplug.subjects.subject import RefusedQuestion
from specplug.tune.journal import Journal
from specplug.tune.server_flags.recorded_questions import AskedQuestion


class RefusedQuestions:
    """Those of one tune, by the keys of what was asked at once."""

    def __init__(self, journal: Journal, spent: Callable[[], float], note: Callable[[str], object]) -> None:
        """Those of the journal, if it is continued.

        spent  returns the seconds of the budget that have passed
        note   receives a sentence for each
        """
        self._journal = journal
        self._spent = spent
        self._note = note
        self._why: dict[tuple[str, ...], str] = {}
        for entry in journal.of("refused"):
            self._leave_out(entry["keys"], entry["why"])

    def __contains__(self, key: str) -> bool:
        """Whether it was refused when it was asked alone."""
        return (key,) in self._why

    def add(self, group: Sequence[AskedQuestion], error: RefusedQuestion) -> None:
        """Questions that were asked at once, of which one was refused."""
        keys = [one.key for one in group]
        self._journal.add("refused", keys=keys, why=str(error), spent=self._spent())
        self._leave_out(keys, str(error))

    def without(self, groups: Sequence[Sequence[AskedQuestion]]) -> list[Sequence[AskedQuestion]]:
        """The groups in which none of them is."""
        return [group for group in groups if not any({one.key for one in group}.issuperset(keys) for keys in self._why)]

    def check(self, answered: int, needed: int) -> None:
        """SpecplugError where they leave fewer answers than a winner needs."""
        if answered < needed:
            raise SpecplugError(
                f"plain decoding cannot be measured: {answered} questions were answered, and {needed} are needed; of "
                f"{len(self._why)} that were refused, the last: {list(self._why.values())[-1]}"
            )

    def _leave_out(self, keys: Sequence[str], why: str) -> None:
        self._why[tuple(keys)] = why
        self._note(f"without {', '.join(keys)}: {why}")
