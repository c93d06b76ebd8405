"""A small model that drafts, named in a profile: the engine opens it and asks it.

Knows names and options. Drafts nothing itself.
"""

from __future__ import annotations

from specplug.core import Requires
from specplug.proposers.placeholder import Named

MAX_DRAFT = 8


class DraftModel(Named):
    """Another model with the target's tokenizer. Source: speculative decoding (arXiv 2211.17192). Keeps nothing.

    model      a GGUF file for llama.cpp, a Hugging Face folder or name for vLLM
    max_draft  longest chain of guesses; the engine stops earlier where one more does not pay. vLLM's own is the
               profile's `vllm.num_speculative_tokens`
    branches   1 guesses a chain; 2 adds the runner-up at every place, where the engine verifies trees
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
