"""Retrieval from corpora on the device: what followed the end of the text in shards that lie on the device.

Matches, chains, buckets and their priors are those of `specplug.proposers.datastore`. Nothing is kept between steps, so
an end of more than LONGEST tokens, which the host can follow, is matched by its last LONGEST ones.
State: the shards, of which one copy serves all proposers with the same corpora.
"""

from __future__ import annotations

from math import inf, nextafter
from typing import Any
from weakref import WeakValueDictionary

import torch

from specplug.corpora.matching import LONGEST
from specplug.engines.vllm.v2.device_chains import NONE, DeviceChains, DeviceStep, DeviceTexts
from specplug.engines.vllm.v2.device_corpora import MOST_DRAFT, DeviceCorpora
from specplug.engines.vllm.v2.device_memory import shards_within
from specplug.engines.vllm.v2.frequent_chain import frequent_chain, sorted_rows
from specplug.proposers.datastore import FEW, LONGEST_EFFECTIVE, MANY, MOST, SAMPLE, Datastore

Tensor = Any

_loaded: WeakValueDictionary[tuple[object, ...], DeviceCorpora] = WeakValueDictionary()
"""By contents, budget and device: what proposers of this process use."""


class DeviceDatastore:
    """Implements `DeviceProposer`."""

    def __init__(self, proposer: Datastore, device: Any) -> None:
        """UsageError where the budget holds no shard, or a shard is damaged."""
        self.buckets = proposer.buckets
        shards, self.summary = shards_within(proposer)
        key = (str(device), proposer.device_memory, *(corpus.manifest.digest for corpus in proposer.shared_corpora))
        self.shared_corpora = _loaded.get(key) or _loaded.setdefault(key, DeviceCorpora(shards, device))
        rows = proposer.bucket_rows
        # [share of the occurrences, number of the occurrences, effective match length]
        table = [*([rows[support]] * 3 for support in (MOST + 2, MOST + 1, MOST)), rows[:MOST]]
        self._bucket_of = torch.tensor(table, dtype=torch.int64, device=device)
        priors = torch.tensor([bucket.prior for bucket in proposer.buckets], dtype=torch.float64, device=device)
        self._prior_of = priors[self._bucket_of]
        # The support is `some` from a fifth on, `most` above a half.
        self._shares = torch.tensor([0.2, nextafter(0.5, inf), 1.0], dtype=torch.float64, device=device)
        self._totals = torch.tensor([FEW * SAMPLE, MANY * SAMPLE], device=device)
        self._least_match = proposer.min_match
        self._least = proposer.min_prob
        self._longest = min(proposer.max_draft, MOST_DRAFT)

    def begin(self, text: Tensor, num_tokens: int) -> None:
        """Nothing is kept per request: its text is in the engine's own array."""

    def observe(self, step: DeviceStep) -> None:
        """Nothing is learned from single passes."""

    def propose(self, texts: DeviceTexts, k: int) -> DeviceChains:
        corpora = self.shared_corpora
        depth = min(k, self._longest)
        length, intervals = corpora.longest_match(texts.tail(LONGEST))
        rows, weights = corpora.following(intervals, length, depth)
        if intervals.shape[1] > 1:  # those of one shard are sorted
            rows, weights = sorted_rows(rows, weights, corpora.num_tokens)
        chain = frequent_chain(rows, weights, corpora.num_tokens)
        share = torch.bucketize(chain.weight / chain.total.double(), self._shares, right=True)
        number = torch.bucketize(chain.total, self._totals, right=True)
        effective = (length[:, None] + torch.arange(depth, device=length.device)).clamp(max=LONGEST_EFFECTIVE)
        path = self._prior_of[share, number, effective].cumprod(1)
        kept = (path >= self._least) & (chain.weight > 0) & (length >= self._least_match)[:, None]
        tokens, buckets = chain.tokens.masked_fill(~kept, NONE), self._bucket_of[share, number, effective]
        if depth < k:
            tokens = torch.nn.functional.pad(tokens, (0, k - depth), value=NONE)
            buckets = torch.nn.functional.pad(buckets, (0, k - depth))
        return DeviceChains(tokens, buckets)

    def end(self, text: Tensor, num_prompt: int, length: Tensor) -> None:
        """Nothing is kept per request."""
