"""Token ids that come with a request."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.core import IntArray, int_array
from specplug.errors import UsageError


def checked_ids(tokens: Sequence[int], num_tokens: int) -> IntArray:
    """int32[n]; UsageError for an id outside of a vocabulary of `num_tokens`."""
    largest = max(tokens, default=0)
    if largest >= num_tokens:
        raise UsageError(f"there is no token {largest}; the vocabulary has {num_tokens} tokens")
    return int_array(tokens)
