"""Records what a drafter would draft at every place of an answer, which one pass over the answer shows."""

from __future__ import annotations

import numpy as np

from specplug.core import IntArray, int_array
from specplug.drafts.confidence import bucket_of
from specplug.drafts.guesses import Guesses
from specplug.engines.llama_cpp.drafters.chain import likeliest_tokens, probability_of
from specplug.engines.llama_cpp.drafters.chain_drafter import ChainDrafter


def recorded_guesses(
    drafter: ChainDrafter, prompt: IntArray, answer: IntArray, top: int, target_slot: int | None = None
) -> Guesses:
    """The drafter's guesses after a prompt and each token of `answer` (int32[n]) but the last: n - 1 places.

    No sequence may run.

    top          how many of the likeliest tokens at each place are recorded
    target_slot  the target's slot that holds the prompt, whose cells are copied; None reads it
    """
    found: list[int] = []
    buckets: list[int] = []
    likeliest = []
    for logits in drafter.logits_along(prompt, answer, target_slot):
        best = int(logits.argmax())
        probability = probability_of(logits, best)
        found.append(drafter.token_of(best))
        buckets.append(bucket_of(probability))
        likeliest.append(likeliest_tokens(logits, drafter.ids, top, best, probability))
    if not likeliest:
        return Guesses(int_array([]), int_array([]))
    return Guesses(
        int_array(found),
        int_array(buckets),
        np.stack([one.tokens for one in likeliest]),
        np.stack([one.probabilities for one in likeliest]),
    )
