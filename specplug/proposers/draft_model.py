"""The proposer `draft_model`: it names a small model that the engine opens to draft.

This module checks the options; it drafts nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from specplug.drafts.retrieval import Window
from specplug.proposers.model_options import MAX_DRAFT, ModelOptions


class DraftModel(ModelOptions):
    """Another model with the target's tokenizer.

    Source: speculative decoding (arXiv 2211.17192). State: none here. Requires: a drafter that the engine opens.
    Cost per step: one pass of the drafter per draft token.

    model      a GGUF file for llama.cpp; a Hugging Face folder or name for vLLM
    max_draft  longest chain, tokens; the engine stops earlier where one more token does not pay. On vLLM the profile's
               `vllm.num_speculative_tokens` is used instead
    branches   1 drafts a chain; 2 adds the second most likely token at every place, where the engine verifies trees
    context    `{first: 64, recent: 512}` lets the drafter read only the first and the recent tokens of a text, with a
               KV cache of that size; `{first: 64, recent: 512, retrieved: 2048, chunk: 256}` also the chunks of the
               text that match its end; by default it reads all. llama.cpp only
    """

    def __init__(
        self, *, model: str, max_draft: int = MAX_DRAFT, branches: int = 1, context: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(max_draft, branches, None if context is None else Window.of(context))
        self.model = model
