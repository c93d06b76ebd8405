"""An index of n-grams: it finds where the end of a context occurred before in a growing list of tokens.

It does not depend on sequences, drafts or acceptance.
Source: hash chains as in LZ77 compressors (RFC 1951, section 4). Per n-gram length there is a table of the last
position and, per position, a link to the one before it. Suffix automata (SAM-Decoding, arXiv 2411.10666) and suffix
trees (SuffixDecoding, arXiv 2411.04975) keep a dictionary per state; hash chains keep 8 bytes per position and n-gram
length, drop old text by moving one offset, and look at the most recent occurrences only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

LEVELS = (1, 2, 4, 8)
"""The n-gram lengths that are indexed by default, shortest first."""

MAX_MATCH = 64
"""Tokens. Matches are measured up to this length: continuations of longer ones are almost certain."""

Occurrence = tuple[int, int]
"""(end, length): the last `length` tokens of the context also occur right before `tokens[end]`."""


class SuffixIndex:
    """A list of tokens with the positions where each of its n-grams ended. The oldest tokens can be dropped.

    Indexing is lazy: `append` only appends, and the next look-up indexes what is new.
    State: list[int] tokens; per n-gram length int64[2**k] heads, 2 to 4 per token, and int64[n] links: 150 to 210 bytes
    per token with four lengths.
    Cost: 2 to 3 us per token; a look-up takes one hash and one table read per n-gram length, then up to 1 us per
    occurrence.

    levels    the n-gram lengths, shortest first
    capacity  number of tokens that the tables are made for; beyond it they are rebuilt at twice the size
    """

    __slots__ = ("_dropped", "_indexed", "_levels", "_mask", "_size", "_tables", "tokens")

    def __init__(self, levels: tuple[int, ...] = LEVELS, *, capacity: int = 256) -> None:
        self.tokens: list[int] = []
        self._levels = levels
        self._size = 1 << (2 * capacity - 1).bit_length()
        self._mask = 0
        self._tables: list[tuple[int, array[int], array[int]]] = []
        self._indexed = 0
        self._dropped = 0

    def append(self, tokens: Iterable[int]) -> None:
        self.tokens.extend(tokens)

    def drop(self, n: int) -> None:
        """Drop the oldest n tokens. Their table entries become invalid by themselves, as they lie before the start."""
        self._catch_up()
        del self.tokens[:n]
        for _, _, links in self._tables:
            # Link 0 belongs to position 0, where no n-gram ends.
            links[: n + 1] = array("q", [-1])
        self._dropped += n
        self._indexed = max(0, self._indexed - n)

    def find_longest(self, context: list[int], limit: int) -> list[Occurrence]:
        """Up to `limit` earlier occurrences of the end of `context`, most recent first.

        They are the occurrences of the longest n-gram among `levels` that occurred at all. `context` may be the index's
        own `tokens`.
        """
        self._catch_up()
        available, mask, dropped = len(context), self._mask, self._dropped
        hits: list[tuple[array[int], list[int], int]] = []
        # Shortest first: where an n-gram never occurred, no longer one did.
        for n, heads, links in self._tables:
            if n > available:
                break
            gram = context[available - n :]
            end = heads[hash(tuple(gram)) & mask] - dropped
            if end < n:
                break
            hits.append((links, gram, end))
        while hits:
            occurrences = self._walk(*hits.pop(), context, limit)
            if occurrences:
                return occurrences
        return []

    def _walk(self, links: array[int], gram: list[int], end: int, context: list[int], limit: int) -> list[Occurrence]:
        tokens, dropped, n = self.tokens, self._dropped, len(gram)
        # The next level had no occurrence: if it is only one token longer, the match is exactly n tokens.
        exact = n + 1 in self._levels
        occurrences: list[Occurrence] = []
        # Other n-grams may share the slot: the search ends early in a crowded one.
        for _ in range(8 * limit):
            if tokens[end - n : end] == gram:
                occurrences.append((end, n if exact else self._match_length(context, end, n)))
                if len(occurrences) == limit:
                    break
            end = links[end] - dropped
            if end < n:
                break
        return occurrences

    def _match_length(self, context: list[int], end: int, known: int) -> int:
        tokens, available = self.tokens, len(context)
        longest = min(end, available, MAX_MATCH)
        length = known
        while length + 8 <= longest and (
            tokens[end - length - 8 : end - length] == context[available - length - 8 : available - length]
        ):
            length += 8
        while length < longest and tokens[end - length - 1] == context[available - length - 1]:
            length += 1
        return length

    def _catch_up(self) -> None:
        """Index the n-grams that end before the last token: one that nothing follows yet predicts nothing."""
        tokens, stop = self.tokens, len(self.tokens)
        if self._indexed + 1 >= stop:
            return
        if not self._tables or 2 * stop > self._size:
            self._rebuild(stop)
        first, mask, dropped = self._indexed + 1, self._mask, self._dropped
        for n, heads, links in self._tables:
            start = first
            if start < n:
                links.extend([-1] * (min(n, stop) - start))
                start = n
            for end in range(start, stop):
                slot = hash(tuple(tokens[end - n : end])) & mask
                links.append(heads[slot])
                heads[slot] = end + dropped
        self._indexed = stop - 1

    def _rebuild(self, num_tokens: int) -> None:
        if 2 * num_tokens > self._size:
            self._size = 1 << (4 * num_tokens - 1).bit_length()
        self._mask = self._size - 1
        self._tables = [(n, array("q", [-1]) * self._size, array("q", [-1])) for n in self._levels]
        self._indexed = 0


def continuation(tokens: list[int], end: int, n: int) -> list[int]:
    """The n tokens from `end` on. If the text ends earlier, the part from `end` on is repeated."""
    result = tokens[end : end + n]
    while len(result) < n:
        result = (result + result)[:n]
    return result
