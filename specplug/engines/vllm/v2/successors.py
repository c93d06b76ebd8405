"""Token recycling on the device: the token that the target ranked first the last time it read the same token.

The chain takes one table row per token, so it uses the first of the ids that `specplug.proposers.token_recycling`
keeps, and nothing else of them; kinds and counters of rows are those of that module.
State: int64[V] successors, int8[V] kinds and int64[V] row numbers: 17 bytes per token of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from specplug.engines.vllm.v2.device_chains import NONE, DeviceChains, DeviceStep, DeviceTexts
from specplug.engines.vllm.v2.last_writer import LastWriter
from specplug.proposers.token_recycling import COUNTS, ROW, START, TokenRecycling

Tensor = Any


class Successors:
    """Implements `DeviceProposer`."""

    def __init__(self, proposer: TokenRecycling, num_tokens: int, device: Any) -> None:
        """num_tokens  size of the vocabulary"""
        self.buckets = proposer.buckets
        self.unknown = num_tokens
        """Stands for a token that is not known, and is its own successor."""
        self._ranks = proposer.k
        self.shared_next = torch.full((num_tokens + 2,), self.unknown, dtype=torch.int64, device=device)
        self.shared_kind = torch.full((num_tokens + 2,), START, dtype=torch.int8, device=device)
        self._last = LastWriter(num_tokens + 1, device)

    def begin(self, text: Tensor, num_tokens: int) -> None:
        """Tokens without a successor get the one that followed them last in the prompt."""
        if num_tokens < 2:
            return
        before, after = text[: num_tokens - 1].long(), text[1:num_tokens].long()
        # Texts can hold ids outside the vocabulary, which stand for images.
        valid = (before >= 0) & (before < self.unknown) & (after >= 0) & (after < self.unknown)
        before = before * valid
        self.shared_next[self._last.targets(before, valid & (self.shared_next[before] == self.unknown))] = after

    def observe(self, step: DeviceStep) -> None:
        emitted = step.emitted.flatten()
        before = step.before.flatten()
        self._count(before, step.after.flatten(), emitted)
        if step.read is None or step.top is None or step.kept is None:
            self.shared_next[self._last.targets(before, emitted)] = step.after.flatten()
            return
        target = self._last.targets(step.read, step.kept)
        self.shared_next[target] = step.top
        self.shared_kind[target] = self.shared_kind[target] | ROW

    def propose(self, texts: DeviceTexts, k: int) -> DeviceChains:
        nothing = torch.full((len(texts.slots), k), NONE, device=texts.slots.device)
        tokens, buckets, _ = self.completed(nothing, texts.last())
        return DeviceChains(tokens.masked_fill(tokens == self.unknown, NONE), buckets)

    def end(self, text: Tensor, num_prompt: int, length: Tensor) -> None:
        """Nothing is kept per request."""

    def completed(self, chains: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chains, continued where they end.

        chains  int64[n, k], with NONE after the end
        last    int64[n], the tokens that they follow
        Returns int64[n, k] tokens, `unknown` where there is no successor; int64[n, k] the buckets of the successors of
        the tokens before; and bool[n, k], whether a token is that successor.
        """
        ended = chains == NONE
        token, tokens = last, []
        for depth in range(chains.shape[1]):
            token = torch.where(ended[:, depth], self.shared_next[token], chains[:, depth])
            tokens.append(token)
        line = torch.stack(tokens, 1)
        before = torch.cat((last[:, None], line[:, :-1]), 1)
        return line, self.shared_kind[before].long() * self._ranks, self.shared_next[before] == line

    def _count(self, before: Tensor, after: Tensor, emitted: Tensor) -> None:
        """Move the counter of every token whose successor was known: up if it was right, else down."""
        following, kind = self.shared_next[before], self.shared_kind[before]
        count = kind % COUNTS
        moved = torch.where(following == after, count + 1, count - 1).clamp(0, COUNTS - 1)
        self.shared_kind[self._last.targets(before, emitted & (following != self.unknown))] = kind - count + moved
