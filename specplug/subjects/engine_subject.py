"""specplug's own llama.cpp engine in this process, as a Subject.

It answers as the server does, with the same scheduler, but without HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from specplug.profile import Profile
from specplug.subjects.subject import Abilities, Question, Reply, SubjectError


class EngineSubject:
    """One engine with a model, opened by `start` and closed by `stop`."""

    def __init__(
        self,
        profile: Profile,
        model_path: Path,
        *,
        slots: int = 1,
        name: str | None = None,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Open nothing yet.

        slots   answers at once
        name    the profile's where None
        notify  receives the engine's messages, one line each
        """
        self.name = name or profile.name
        self._profile = profile
        self._model_path = model_path
        self._slots = slots
        self._notify = notify

    @property
    def abilities(self) -> Abilities:
        raise SubjectError(f"{self.name} was not started; `start` comes first")

    def start(self, flags: Sequence[str] = ()) -> None:
        raise SubjectError(f"{self.name} cannot be started yet")

    def ask(self, question: Question) -> Reply:
        raise SubjectError(f"{self.name} was not started; `start` comes first")

    def sleep(self) -> None:
        """Nothing to do: the engine computes only while it is asked."""

    def wake(self) -> None:
        """Nothing to do."""

    def stop(self) -> None: ...
