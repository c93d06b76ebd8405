"""A drafter with a trimmed head, named in a profile: the engine opens it and asks it.

Knows names and options. Drafts nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from specplug.proposers.draft_model import MAX_DRAFT, DraftModel


class VocabTrim(DraftModel):
    """What `specplug build vocab-trim` made. Source: VocabTrim (arXiv 2506.22694). Keeps nothing.

    model  the drafter's folder, or `drafter:NAME`
    build  what `specplug build vocab-trim` needs to make it, --out left out: said where the folder is not there
    The other options are those of DraftModel.
    """

    def __init__(self, *, model: str, build: Sequence[str] = (), max_draft: int = MAX_DRAFT, branches: int = 1) -> None:
        super().__init__(model=model, max_draft=max_draft, branches=branches)
        self.build = tuple(build)
