"""Shards of corpora on the device, and the search for the end of a text in them.

An end of a text is searched for from its last token on, each time with one more token before it. In the order of the
suffixes, those that begin with one token are in the order of what follows that token. So where P is found, the
suffixes that begin with cP are those that begin with c and go on with a suffix in the interval of P, and their interval
follows from two binary searches in one ascending array of numbers. This is the backward search of Ferragina and Manzini
(FOCS 2000), with the array of Grossi and Vitter (STOC 2000) in place of counts. It gives the intervals of all lengths
of matches without comparing tokens, and every search takes the same number of steps.
State: `device_memory.BYTES_PER_TOKEN`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from specplug.corpora.folder import AGAIN
from specplug.corpora.matching import LONGEST
from specplug.corpora.shard import Shard
from specplug.engines.vllm.v2.device_memory import RANK_BITS
from specplug.errors import UsageError
from specplug.proposers.datastore import SAMPLE

Tensor = Any

MOST_DRAFT = 64
"""Tokens. What follows a match is read up to this length."""

CHUNK = 1 << 22
"""Suffixes that are loaded at a time, to bound the memory that loading takes beside the arrays."""


class DeviceCorpora:
    """Shards of one vocabulary, one after the other in each array."""

    def __init__(self, shards: Sequence[Shard], device: Any) -> None:
        """UsageError for a shard whose suffixes are not in order."""
        sizes = [len(shard) for shard in shards]
        firsts = np.cumsum([0, *sizes])
        total = int(firsts[-1])
        self.num_tokens = max(shard.num_tokens for shard in shards)
        """The size of the largest vocabulary; as a token, the border after a document."""
        self._known = min(shard.num_tokens for shard in shards)
        # What is read beyond the end of a document is cut there; beyond the end of the array it has to exist.
        self.shared_tokens = torch.full(
            (total + LONGEST + MOST_DRAFT,), self.num_tokens, dtype=torch.int32, device=device
        )
        self.shared_order = torch.zeros(total + SAMPLE, dtype=torch.int32, device=device)
        """The starts of the suffixes of each shard in ascending order."""
        self.shared_keys = torch.empty(total, dtype=torch.int64, device=device)
        """For each suffix its shard, its first token and the place in the order of the suffix after that token."""
        self._symbols = self.num_tokens + 2  # tokens, the border, and one that no suffix has
        for number, (shard, first) in enumerate(zip(shards, firsts.tolist(), strict=False)):
            self._load(shard, number * self._symbols, first)
        self._shards = torch.arange(len(shards), device=device) * self._symbols
        self._all = torch.tensor([firsts[:-1].tolist(), firsts[1:].tolist()], device=device).T.contiguous()
        self._sample = torch.arange(SAMPLE, device=device)
        self._odd = 2 * self._sample + 1

    def _load(self, shard: Shard, symbol: int, first: int) -> None:
        device, size = self.shared_keys.device, len(shard)
        chunks = [slice(begin, min(begin + CHUNK, size)) for begin in range(0, size, CHUNK)]
        tokens, order = self.shared_tokens[first : first + size], self.shared_order[first : first + size]
        keys = self.shared_keys[first : first + size]
        places = torch.zeros(size + 1, dtype=torch.int32, device=device)  # the suffix without a token comes first
        for chunk in chunks:
            ids = shard.tokens[chunk].astype(np.int64)
            ids[ids >= shard.num_tokens] = self.num_tokens
            tokens[chunk] = torch.from_numpy(ids).to(device)
            starts = shard.order[chunk].astype(np.int64)
            if starts.max() >= size:
                raise UsageError(f"{shard.stem}: damaged (a suffix starts after its end); {AGAIN}")
            on_device = torch.from_numpy(starts).to(device)
            order[chunk] = on_device + first
            places[on_device] = torch.arange(chunk.start, chunk.stop, dtype=torch.int32, device=device)
        for chunk in chunks:
            starts = order[chunk].long() - first
            keys[chunk] = ((tokens[starts].long() + symbol) << RANK_BITS) + (places[starts + 1] + first)
        for chunk in chunks:
            part = keys[max(0, chunk.start - 1) : chunk.stop]
            if bool((part[1:] < part[:-1]).any()):
                raise UsageError(f"{shard.stem}: damaged (its suffixes are not in order); {AGAIN}")

    def longest_match(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        """int64[n]: the length of the longest end of each text that occurs in any shard, and int64[n, shards, 2]: the
        first suffix that starts with it, and the first one after it that does not. Any empty intervals where nothing
        matches.

        tail  int64[n, m]: the last tokens of each text, the last one first; negative before its start
        """
        # A token outside of the vocabulary, which stands for an image, occurs nowhere.
        known = tail.masked_fill(tail >= self._known, -1)
        symbols = (known[:, :, None, None] + self._shards[:, None]) << RANK_BITS
        bounds, found = self._all, []
        for place in range(tail.shape[1]):
            bounds = torch.searchsorted(self.shared_keys, symbols[:, place] + bounds)
            found.append(bounds)
        intervals = torch.stack(found, 1)
        occurs = (intervals[..., 0] < intervals[..., 1]).any(2)
        length = occurs.sum(1)  # where an end occurs, shorter ones do, too
        last = (length - 1).clamp(min=0)[:, None, None, None]
        return length, intervals.gather(1, last.expand(-1, 1, *self._all.shape))[:, 0]

    def following(self, intervals: Tensor, length: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """int32[n, shards * SAMPLE, depth]: what follows the first tokens of suffixes, with `num_tokens` from the end
        of a document on; and int64[n, shards * SAMPLE]: for how many suffixes each stands, times SAMPLE.

        The sample of each interval is that of `Shard.following`; unused places stand for no suffix.

        intervals  int64[n, shards, 2]
        length     int64[n]  tokens of each suffix that are skipped, at most LONGEST
        depth      at most MOST_DRAFT
        """
        low, count = intervals[..., :1], intervals[..., 1:] - intervals[..., :1]
        at = low + torch.where(count > SAMPLE, (self._odd * count) // (2 * SAMPLE), self._sample)
        weights = count.clamp(min=SAMPLE) * (self._sample < count)
        windows = self.shared_tokens.as_strided((len(self.shared_tokens) - depth + 1, depth), (1, 1))
        rows = windows[self.shared_order[at] + length[:, None, None]].flatten(1, 2)
        ended = rows.cummax(2).values == self.num_tokens
        return rows.masked_fill(ended, self.num_tokens), weights.flatten(1)
