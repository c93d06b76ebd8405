"""One run of a tune: what it was asked for, what it has found so far, and where that is kept.

This module measures nothing, and does not depend on the order of the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specplug.registry import ProposerSpec
from specplug.tune.budget import Budget, Progress
from specplug.tune.candidates import BUILTIN_METHOD
from specplug.tune.journal import Journal
from specplug.tune.recording import (
    trace_about,
)
from specplug.tune.subject import Subject
from specplug.tune.tune_request import Request

OWN_PLANNER = "specplug's planner"


class TuneRun:
    """The state that all stages share.

    busy      how many cores other programs kept busy when the tune began, in words; None where few
    best      the best setting so far, in words
    drafters  those that are tried
    notes     sentences for the report
    """

    def __init__(
        self,
        request: Request,
        subject: Subject,
        journal: Journal,
        budget: Budget,
        notify: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self.request = request
        self.subject = subject
        self.journal = journal
        self.budget = budget
        self.notify = notify
        self.notes: list[str] = []
        self.busy: str | None = None
        self.best = ""
        self.drafters: Sequence[ProposerSpec] = request.drafters
        self._progress = progress

    def add(self, kind: str, **values: Any) -> dict[str, Any]:
        """Add an entry to the journal, with the time spent so far."""
        return self.journal.add(kind, spent=round(self.budget.spent, 3), **values)

    def note(self, text: str) -> None:
        """Notify the user now, and keep the text for the report."""
        self.notes.append(text)
        self.notify(text)

    def report(self, stage: str, share: float) -> None:
        self._progress(stage, share, self.best, self.budget.left)

    @property
    def planning(self) -> str:
        """What chooses the draft tokens to verify, in words."""
        words = {None: OWN_PLANNER, "adaptive": "vLLM's adaptive verification", "batch_size": "the batch size"}
        return words[self.subject.engine_planning]

    def methods(self) -> list[ProposerSpec]:
        """One setting of each method in the grid, without the engine's own drafters and models that draft."""
        settings = self.subject.settings_to_try(1, self.request.retrieval)
        specs = {spec.method: spec for setting in reversed(settings) for spec in setting.proposers}
        return [spec for method, spec in specs.items() if method != BUILTIN_METHOD]

    def trace_about(self, max_tokens: int) -> dict[str, Any]:
        """The key of the trace of this tune."""
        here = self.journal.entries[0]["fingerprint"]
        profile, batched = self.subject.profile, self.subject.batched
        return trace_about(here, profile, self.request.prompts, max_tokens, batched=batched)
