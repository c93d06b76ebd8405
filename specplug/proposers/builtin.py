"""A drafter of the engine's own, named so that it can be run, measured and chosen like ours.

Knows names and options. Drafts nothing itself.
"""

from __future__ import annotations

from typing import Literal

from specplug.core import Requires
from specplug.proposers.placeholder import Named


class Builtin(Named):
    """One of vLLM's own methods. Its draft length is the profile's `vllm.num_speculative_tokens`.

    Source: vllm/config/speculative.py. Requires: an engine that has it. Keeps nothing.

    name               ngram: prompt lookup; suffix: suffix decoding, with arctic-inference; draft_model: a small model
    model              of draft_model: a Hugging Face folder or name
    prompt_lookup_min, prompt_lookup_max  of ngram: the lengths of match that count
    """

    requires = Requires(builtin=True)

    def __init__(
        self,
        *,
        name: Literal["ngram", "suffix", "draft_model"],
        model: str | None = None,
        prompt_lookup_min: int | None = None,
        prompt_lookup_max: int | None = None,
    ) -> None:
        if (name == "draft_model") != (model is not None):
            raise ValueError(f"name {name}, model {model}: draft_model needs a model, the others take none")
        if name != "ngram" and (prompt_lookup_min, prompt_lookup_max) != (None, None):
            raise ValueError(f"prompt_lookup_min and prompt_lookup_max belong to ngram, not to {name}")
        self.name = name
        self.model = model
        self.prompt_lookup_min = prompt_lookup_min
        self.prompt_lookup_max = prompt_lookup_max
