"""The proposer `vocab_trim`: it names a draft model with a trimmed head, which the engine opens to draft.

This module holds the options; it drafts nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specplug.proposers.draft_model import DraftModel
from specplug.proposers.model_options import MAX_DRAFT


class VocabTrim(DraftModel):
    """A drafter that `specplug build vocab-trim` wrote.

    Source: VocabTrim (arXiv 2506.22694). State, requires and cost per step are those of DraftModel.

    model  the drafter's folder, or `drafter:NAME`
    build  arguments of `specplug build vocab-trim` that build it, without --out: the commands build a missing drafter
           with them, once the user has agreed
    The other options are those of DraftModel.
    """

    def __init__(
        self,
        *,
        model: str,
        build: Sequence[str] = (),
        max_draft: int = MAX_DRAFT,
        branches: int = 1,
        context: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(model=model, max_draft=max_draft, branches=branches, context=context)
        self.build = tuple(build)
