"""The proposer `draft_model`: it names a small model that the engine opens to draft.

This module checks the options; it drafts nothing itself.
"""

from __future__ import annotations

from specplug.core import Requires
from specplug.proposers.placeholder import NamedDrafter

MAX_DRAFT = 8
"""Default length of the longest chain, tokens."""


class DraftModel(NamedDrafter):
    """Another model with the target's tokenizer.

    Source: speculative decoding (arXiv 2211.17192). State: none here. Requires: a drafter that the engine opens.
    Cost per step: one pass of the drafter per draft token.

    model      a GGUF file for llama.cpp; a Hugging Face folder or name for vLLM
    max_draft  longest chain, tokens; the engine stops earlier where one more token does not pay. On vLLM the profile's
               `vllm.num_speculative_tokens` is used instead
    branches   1 drafts a chain; 2 adds the second most likely token at every place, where the engine verifies trees
    """

    requires = Requires(drafter=True)

    def __init__(self, *, model: str, max_draft: int = MAX_DRAFT, branches: int = 1) -> None:
        if not 1 <= max_draft <= 64:
            raise ValueError(f"max_draft is {max_draft}; use 1 to 64")
        if branches not in (1, 2):
            raise ValueError(f"branches is {branches}; use 1 or 2")
        self.model = model
        self.max_draft = max_draft
        self.branches = branches
