"""The proposer `eagle3`: it names an EAGLE-3 head, which the engine opens to draft.

This module checks the options; it drafts nothing itself.
"""

from __future__ import annotations

from specplug.proposers.model_options import MAX_DRAFT, ModelOptions


class Eagle3(ModelOptions):
    """A head of one layer that was trained to continue the target's hidden states.

    Source: EAGLE-3 (arXiv 2503.01840). State: the target's hidden states of the texts in its cache. Requires: a head
    that was trained for this model. Cost per draft token: one layer and the head's output matrix. On vLLM it is vLLM's
    own method `eagle3`, with the profile's `vllm.num_speculative_tokens`. Heads with a trimmed vocabulary, which
    `specplug build vocab-trim` makes of EAGLE-3 heads for vLLM, are named under `vocab_trim`.

    model      the head: a GGUF file of the architecture eagle3 for llama.cpp; a Hugging Face folder or name for vLLM
    max_draft  longest chain, tokens; the engine stops earlier where one more token does not pay. llama.cpp only
    branches   1 drafts a chain; 2 adds the second most likely token at every place, where the engine verifies trees.
               llama.cpp only
    """

    def __init__(self, *, model: str, max_draft: int = MAX_DRAFT, branches: int = 1) -> None:
        super().__init__(max_draft, branches, None)
        self.model = model
