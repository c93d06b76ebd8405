"""Suffix decoding on the device: what followed the end of the text where that occurred before.

It looks into the request's own text and a ring of finished answers. Buckets and their priors are those of
`specplug.proposers.suffix`, which also considers several continuations per token of the chain; here one occurrence per
store gives the chain, and all occurrences in the own text give its bucket.
"""

from __future__ import annotations

from typing import Any

import torch

from specplug.engines.vllm.v2.answer_ring import AnswerRing
from specplug.engines.vllm.v2.device_chains import NONE, DeviceChains, DeviceStep, DeviceTexts
from specplug.engines.vllm.v2.text_lookup import own_match, repeated
from specplug.proposers.suffix import CONTEXT_TOKENS, LOCAL, MOST, SHARED, Suffix

Tensor = Any

LONGEST_MATCH = 16
"""Tokens. Buckets tell longer matches apart, but chains hardly differ."""


class DeviceSuffix:
    """Implements `DeviceProposer`."""

    def __init__(self, proposer: Suffix, device: Any) -> None:
        self.buckets = proposer.buckets
        # [store, support, effective match length]
        self._bucket_of = torch.tensor(proposer.bucket_rows, dtype=torch.int64, device=device)
        priors = torch.tensor([bucket.prior for bucket in proposer.buckets], dtype=torch.float32, device=device)
        self._prior_of = priors[self._bucket_of]
        self._least = proposer.min_prob
        self._longest = proposer.max_draft
        self.shared_ring = AnswerRing(proposer.shared_tokens, device) if proposer.shared_tokens > 1 else None

    def begin(self, text: Tensor, num_tokens: int) -> None:
        """Nothing is kept per request: its text is in the engine's own array."""

    def observe(self, step: DeviceStep) -> None:
        """Nothing is learned from single passes."""

    def propose(self, texts: DeviceTexts, k: int) -> DeviceChains:
        rows, lengths = texts.window()
        tail = texts.tail(LONGEST_MATCH)
        own = own_match(rows, lengths, tail)
        depth = torch.arange(k, device=rows.device)
        tokens = repeated(rows, lengths, own.end, k).masked_fill((own.length == 0)[:, None], NONE)
        chain = self._chain(tokens, LOCAL, _support(own.same, own.total), own.length, depth)
        if self.shared_ring is None:
            return chain[0]
        length, end = self.shared_ring.find(tail)
        tokens = self.shared_ring.continuation(end, k).masked_fill((length == 0)[:, None], NONE)
        other = self._chain(tokens, SHARED, torch.zeros_like(length), length, depth)
        better = (other[1] > chain[1])[:, None]
        return DeviceChains(
            torch.where(better, other[0].tokens, chain[0].tokens),
            torch.where(better, other[0].buckets, chain[0].buckets),
        )

    def end(self, text: Tensor, num_prompt: int, length: Tensor) -> None:
        if self.shared_ring is not None:
            self.shared_ring.append(text, max(0, num_prompt - CONTEXT_TOKENS), length)

    def _chain(
        self, tokens: Tensor, store: int, support: Tensor, match: Tensor, depth: Tensor
    ) -> tuple[DeviceChains, Tensor]:
        """The chain up to the least probability of a path, and float32[n], the tokens that its priors let expect."""
        effective = (match[:, None] + depth).clamp(max=self._bucket_of.shape[2] - 1)
        buckets = self._bucket_of[store][support[:, None], effective]
        prior = self._prior_of[store][support[:, None], effective]
        exists = tokens >= 0
        path = (prior * exists).cumprod(1)
        kept = (path >= self._least) & exists
        if self._longest < len(depth):
            kept &= depth < self._longest
        return DeviceChains(tokens.masked_fill(~kept, NONE), buckets), (path * kept).sum(1)


def _support(same: Tensor, total: Tensor) -> Tensor:
    """The index of the support in the buckets where `same` of `total` occurrences continue alike."""
    all_alike = same.clamp(1, 3) - 1
    fewer = (2 * same <= total).long() + (3 * same < total)  # the second follows from the first
    return torch.where(same == total, all_alike, MOST + fewer)
