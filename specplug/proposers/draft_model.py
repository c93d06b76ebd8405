"""The proposer `draft_model`: it names a small model that the engine opens to draft.

This module checks the options; it drafts nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from specplug.core import Requires
from specplug.proposers.placeholder import NamedDrafter

MAX_DRAFT = 8
"""Default length of the longest chain, tokens."""

SMALLEST_RECENT = 32
"""Fewest recent tokens of a window."""


class DraftModel(NamedDrafter):
    """Another model with the target's tokenizer.

    Source: speculative decoding (arXiv 2211.17192). State: none here. Requires: a drafter that the engine opens.
    Cost per step: one pass of the drafter per draft token.

    model      a GGUF file for llama.cpp; a Hugging Face folder or name for vLLM
    max_draft  longest chain, tokens; the engine stops earlier where one more token does not pay. On vLLM the profile's
               `vllm.num_speculative_tokens` is used instead
    branches   1 drafts a chain; 2 adds the second most likely token at every place, where the engine verifies trees
    context    `{first: 64, recent: 512}` lets the drafter read only the first and the recent tokens of a text, with a
               KV cache of that size; by default it reads all. llama.cpp only
    """

    requires = Requires(drafter=True)

    def __init__(
        self, *, model: str, max_draft: int = MAX_DRAFT, branches: int = 1, context: Mapping[str, int] | None = None
    ) -> None:
        if not 1 <= max_draft <= 64:
            raise ValueError(f"max_draft is {max_draft}; use 1 to 64")
        if branches not in (1, 2):
            raise ValueError(f"branches is {branches}; use 1 or 2")
        self.model = model
        self.max_draft = max_draft
        self.branches = branches
        self.window: tuple[int, int] | None = None
        """The number of first and of recent tokens that the drafter reads; None for all."""
        if context is not None:
            if set(context) != {"first", "recent"}:
                raise ValueError("context needs the keys first and recent, such as {first: 64, recent: 512}")
            if context["first"] < 1 or context["recent"] < SMALLEST_RECENT:
                raise ValueError(
                    f"context is {dict(context)}; use at least 1 first and {SMALLEST_RECENT} recent tokens"
                )
            self.window = context["first"], context["recent"]
