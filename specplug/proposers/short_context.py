"""The proposer `short_context`: the target's own weights draft from a part of the text.

This module checks the options; the engine opens the drafter.
"""

from __future__ import annotations

from specplug.drafts.retrieval import CHUNK, Window
from specplug.proposers.model_options import MAX_DRAFT, ModelOptions

KV_SHARE, MOST_KV_SHARE = 0.1, 0.5
"""Default and upper limit of `kv_share`. Chosen."""


class ShortContext(ModelOptions):
    """The target itself, with a second KV cache that holds a part of the text: a pass reads fewer keys and values.

    Source: RAPID (arXiv 2502.20330) with one model for both roles. It copies the target's cells of the parts that it
    keeps, so that it reads nothing and positions stay.
    State: none here. Requires: a drafter that the engine opens: llama.cpp's, or vLLM's V2 model runner. Models whose
    layers all attend to the complete text.
    Cost per step: one pass of the target over the short context per draft token.

    first      tokens that are kept at the beginning of the text
    recent     tokens that are kept at its end
    retrieved  tokens of the chunks that match the end of the text, a multiple of `chunk`; 0 keeps none
    chunk      tokens of a chunk
    kv_share   vLLM: the share of the memory, free once the weights are loaded, that the second caches take at most
    max_draft, branches  as in DraftModel
    """

    def __init__(
        self,
        *,
        first: int = 64,
        recent: int = 512,
        retrieved: int = 2048,
        chunk: int = CHUNK,
        max_draft: int = MAX_DRAFT,
        branches: int = 1,
        kv_share: float = KV_SHARE,
    ) -> None:
        if not 0 < kv_share <= MOST_KV_SHARE:
            raise ValueError(f"kv_share is {kv_share}; use more than 0, and at most {MOST_KV_SHARE}")
        self.kv_share = kv_share
        window = Window(first, recent, retrieved, chunk)
        window.check()
        super().__init__(max_draft, branches, window)
