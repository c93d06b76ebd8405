"""The proposer `mtp`: it names the MTP layer of a model, which the engine opens to draft.

This module checks the options; it drafts nothing itself.
"""

from __future__ import annotations

from specplug.proposers.model_options import MAX_DRAFT, ModelOptions


class Mtp(ModelOptions):
    """The model's own MTP layers (multi-token prediction), which were trained with it to predict the tokens after next.

    Source: DeepSeek-V3 (arXiv 2412.19437). State: the target's hidden states of the texts in its cache. Requires: a
    model with such a layer, or several. Cost per draft token: one layer and the output matrix. On vLLM it
    is vLLM's own method `mtp`, with the profile's `vllm.num_speculative_tokens`; the options below are for llama.cpp.

    model      a GGUF file with the MTP layers, where the model's own file lacks it; by default the model's own
    head       a folder, or `drafter:NAME`, with some rows of the output matrix, which `specplug build vocab-trim`
               writes: the layer drafts these tokens only, and costs less. By default all rows
    max_draft  longest chain, tokens; the engine stops earlier where one more token does not pay
    branches   1 drafts a chain; 2 adds the second most likely token at every place, where the engine verifies trees
    """

    def __init__(
        self, *, model: str | None = None, head: str | None = None, max_draft: int = MAX_DRAFT, branches: int = 1
    ) -> None:
        super().__init__(max_draft, branches, None)
        self.model = model
        self.head = head
