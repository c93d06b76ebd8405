"""The options that all proposers share for which the engine opens a drafter.

This module checks options; it drafts nothing itself.
"""

from __future__ import annotations

from specplug.core import Requires
from specplug.drafts.retrieval import Window
from specplug.proposers.placeholder import NamedDrafter

MAX_DRAFT = 8
"""Default length of the longest chain, tokens."""


class ModelOptions(NamedDrafter):
    """Base of proposers whose drafter runs passes of a model.

    max_draft, branches, window  as in DraftModel; `window` is None for a drafter that reads complete texts
    """

    requires = Requires(drafter=True)

    def __init__(self, max_draft: int, branches: int, window: Window | None) -> None:
        if not 1 <= max_draft <= 64:
            raise ValueError(f"max_draft is {max_draft}; use 1 to 64")
        if branches not in (1, 2):
            raise ValueError(f"branches is {branches}; use 1 or 2")
        self.max_draft = max_draft
        self.branches = branches
        self.window = window
