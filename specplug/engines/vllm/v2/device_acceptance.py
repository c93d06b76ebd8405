"""How often draft tokens of each bucket are accepted, counted on the device.

The rule is that of `specplug.planning.acceptance`; counts are whole numbers and therefore do not depend on the order in
which a device adds them.
State: three float32 per bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from specplug.core import Bucket
from specplug.planning.acceptance import AcceptanceTable
from specplug.planning.constants import ACCEPTANCE_DECAY

Tensor = Any


class DeviceAcceptance:
    """P(draft token accepted | the tokens before it were) per bucket. The bucket after the last one is for no token."""

    def __init__(
        self, buckets: Sequence[Bucket], device: Any, learned: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """`learned` maps bucket names to (hits, misses), as a profile stores them."""
        start = AcceptanceTable(buckets, learned)
        self.nothing = len(buckets)
        """The bucket of places without a draft token."""
        self._hits = torch.tensor([*start.hits, 0.0], dtype=torch.float32, device=device)
        self._misses = torch.tensor([*start.misses, 1.0], dtype=torch.float32, device=device)
        self.probability = self._hits / (self._hits + self._misses)
        """float32[buckets + 1]; 0 for no token."""

    def learn(self, tokens: Tensor, buckets: Tensor, emitted: Tensor, valid: Tensor) -> Tensor:
        """Compare chains with the tokens that were emitted instead, verified or not.

        tokens, buckets  int64[n, k]
        emitted          int64[n, k]
        valid            bool[n, k]  whether there is an emitted token
        Returns bool[n, k]: the draft tokens that agree, with all before them.
        """
        drafted = (buckets != self.nothing) & valid
        agreeing = (drafted & (tokens == emitted)).cumprod(1) > 0
        counted = drafted.clone()
        counted[:, 1:] &= agreeing[:, :-1]
        hits, misses = self._sums(buckets, agreeing), self._sums(buckets, counted & ~agreeing)
        kept = ACCEPTANCE_DECAY ** (hits + misses)
        self._hits = self._hits * kept + hits
        self._misses = self._misses * kept + misses
        self.probability = self._hits / (self._hits + self._misses)
        return agreeing

    def _sums(self, buckets: Tensor, flags: Tensor) -> Tensor:
        counts = torch.zeros(self.nothing + 1, dtype=torch.int64, device=buckets.device)
        return counts.scatter_add_(0, buckets.flatten(), flags.flatten().long()).float()
