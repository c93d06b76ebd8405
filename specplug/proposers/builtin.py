"""The proposer `builtin`: it names a method of the engine's own, to be run, measured and chosen like any other.

This module checks the options; it drafts nothing itself.
"""

from __future__ import annotations

from typing import Literal

from specplug.core import Requires
from specplug.proposers.placeholder import NamedDrafter


class Builtin(NamedDrafter):
    """One of vLLM's own methods. Its draft length is the profile's `vllm.num_speculative_tokens`.

    Source: vllm/config/speculative.py. State: none here. Requires: an engine that has it. Cost per step: vLLM's.

    name                                  ngram is prompt lookup, ngram_gpu the same on the device; suffix is suffix
                                          decoding, which needs the package arctic-inference; draft_model is a small
                                          model, eagle3 an EAGLE-3 head, mtp the head of the target's own checkpoint
    model                                 of draft_model and eagle3: a Hugging Face folder or name
    prompt_lookup_min, prompt_lookup_max  of ngram and ngram_gpu: shortest and longest match, tokens
    """

    requires = Requires(builtin=True)

    def __init__(
        self,
        *,
        name: Literal["ngram", "ngram_gpu", "suffix", "draft_model", "eagle3", "mtp"],
        model: str | None = None,
        prompt_lookup_min: int | None = None,
        prompt_lookup_max: int | None = None,
    ) -> None:
        if (name in ("draft_model", "eagle3")) != (model is not None):
            raise ValueError(f"name {name}, model {model}: draft_model and eagle3 need a model, the others take none")
        if name not in ("ngram", "ngram_gpu") and (prompt_lookup_min, prompt_lookup_max) != (None, None):
            raise ValueError(f"prompt_lookup_min and prompt_lookup_max belong to ngram, not to {name}")
        self.name = name
        self.runs_model = name in ("draft_model", "eagle3", "mtp")
        self.model = model
        self.prompt_lookup_min = prompt_lookup_min
        self.prompt_lookup_max = prompt_lookup_max
