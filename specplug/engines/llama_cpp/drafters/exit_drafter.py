"""Drafts with the first layers of the target, and changes their number while it drafts.

Every exit is a `ModelDrafter` with KV cells of its own. This module opens and closes nothing but these; how an exit is
chosen is said in `planning/choosing_drafter.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from specplug.drafts.confidence import EDGES
from specplug.engines.llama_cpp.drafters.model_drafter import ModelDrafter
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.planning.choosing_drafter import ChoosingDrafter


class ExitDrafter(ChoosingDrafter[ModelDrafter]):
    """Drafts with one of several exits of the target, or with none."""

    def __init__(
        self, exits: Sequence[int], drafters: Sequence[ModelDrafter], *, total: int, by_layers: bool = False
    ) -> None:
        """As `ChoosingDrafter`."""
        super().__init__(exits, drafters, total=total, likeliest=len(EDGES) + 1, by_layers=by_layers)

    def forget(self) -> None:
        """Return to the state after opening, except for measured costs."""
        for drafter in self.drafters:
            drafter.forget()
        self.start_afresh()

    def use_threads(self, threads: int) -> None:
        for drafter in self.drafters:
            drafter.use_threads(threads)

    def close(self) -> None:
        for drafter in self.drafters:
            drafter.close()

    def use_sampler(self, seq: int, sampler: Sampler) -> None:
        for drafter in self.drafters:
            drafter.use_sampler(seq, sampler)
