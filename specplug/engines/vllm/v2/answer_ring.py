"""A ring of the tokens of finished answers, and where their n-grams occurred last.

Tables grow no further than the ring; an entry whose tokens were overwritten fails the comparison with the ring. Largest
values win in the tables, so their state does not depend on the order in which a device writes.
State: 4 bytes per token of the ring, and for each of three n-gram lengths 16 to 32 bytes.
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = Any

GRAMS = (8, 4, 2)
"""N-gram lengths, longest first. A single equal token in another answer predicts next to nothing."""

SEPARATOR = -1
"""Between two answers."""

MULTIPLIER = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio (Knuth, The Art of Computer Programming, 6.4)."""

MASK = (1 << 64) - 1


class AnswerRing:
    """Looks up ends of texts in the answers that are stored."""

    def __init__(self, capacity: int, device: Any) -> None:
        """capacity  tokens"""
        self.capacity = capacity
        self._slots = 1 << (2 * capacity - 1).bit_length()
        # The place after the end of each tensor takes what is not to be written.
        self.shared_tokens = torch.full((capacity + 1,), SEPARATOR, dtype=torch.int32, device=device)
        self._ends = torch.zeros(len(GRAMS) * self._slots + 1, dtype=torch.int64, device=device)
        """Per n-gram length a table: where the n-gram of each hash ended last, counted from 1 on."""
        self._written = torch.zeros((), dtype=torch.int64, device=device)
        weights, factor = [], 1
        for _ in range(GRAMS[0]):
            factor = factor * MULTIPLIER & MASK
            weights.append(factor - (1 << 64) if factor >> 63 else factor)
        table = [weights[:gram] + [0] * (GRAMS[0] - gram) for gram in GRAMS]
        self._weights = torch.tensor(table, dtype=torch.int64, device=device)
        self._firsts = torch.arange(len(GRAMS), device=device) * self._slots
        self._grams = torch.tensor(GRAMS, device=device)

    def append(self, text: Tensor, first: int, length: Tensor) -> None:
        """Store text[first:length]. Of an answer longer than the ring, the end is stored.

        text    int32[w]
        length  int32[]
        """
        text = text.long()
        length = length.clamp(max=len(text))
        places = torch.arange(len(text), device=text.device)
        start = (length - self.capacity + 1).clamp(min=first)
        position = self._written + places - start
        stored = (places >= start) & (places < length)
        slots = torch.where(stored, position % self.capacity, self.capacity)
        self.shared_tokens[slots] = torch.where(stored, text, SEPARATOR).int()
        back = torch.arange(GRAMS[0], device=text.device)
        windows = text[(places[:, None] - back).clamp(min=0)]
        # An n-gram that ends the answer predicts nothing.
        followed = (stored & (places < length - 1))[:, None] & (places[:, None] - self._grams + 1 >= start)
        slots = torch.where(followed, self._places(windows), len(self._ends) - 1)
        self._ends.scatter_reduce_(0, slots.flatten(), (position + 1)[:, None].expand_as(slots).flatten(), "amax")
        self._written += (length - start).clamp(min=0) + 1
        # An index without a dimension would be read back.
        self.shared_tokens.index_fill_(0, (self._written - 1)[None] % self.capacity, SEPARATOR)

    def find(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        """int64[n], int64[n]: tokens that match, 0 if none does, and the position after the match in the ring.

        tail  int64[n, m]  the last tokens of each text, the last one first, with m at least the longest n-gram
        """
        ends = self._ends[self._places(tail[:, : GRAMS[0]])]
        position = ends[:, :, None] - 1 - torch.arange(tail.shape[1], device=tail.device)
        there = self.shared_tokens[position % self.capacity]
        in_ring = (position > self._written - 1 - self.capacity) & (position >= 0)
        length = ((there == tail[:, None]) & (tail >= 0)[:, None] & in_ring).cumprod(2).sum(2)
        # Of n-grams that lead to matches of one length, the shortest one was seen last.
        best = ((length << 40) + ends).masked_fill(length < self._grams, 0).amax(1)
        return best >> 40, best & ((1 << 40) - 1)

    def continuation(self, end: Tensor, k: int) -> Tensor:
        """int64[n, k]: the tokens from a position of `find` on; -1 from the end of the answer on."""
        position = end[:, None] + torch.arange(k, device=end.device)
        tokens = self.shared_tokens[position % self.capacity].long().masked_fill(position >= self._written, SEPARATOR)
        return tokens.masked_fill((tokens < 0).cumsum(1) > 0, SEPARATOR)

    def _places(self, windows: Tensor) -> Tensor:
        """int64[n, grams]: the places in the tables of the n-grams that end a text.

        windows  int64[n, longest n-gram], the last token first
        """
        hashes = ((windows + 1)[:, None] * self._weights).sum(2)
        # The upper bits of a sum of products depend on all bits of the factors.
        return ((hashes >> 24) & (self._slots - 1)) + self._firsts
