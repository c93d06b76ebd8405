"""llama-server's `ngram-cache`, without cache files: counts of what followed the last one to four tokens.

Knows tokens only. Source: llama.cpp's common/ngram-cache.cpp and common/speculative.cpp.
"""

from __future__ import annotations

from specplug.tune.server_flags.lookup_rules import Tokens

LONGEST = 4
"""Tokens of the longest n-grams."""

SIZE = 8
"""Draft tokens at most."""

LEAST_SEEN = (2, 2, 1, 1)
"""How often n-grams of one to four tokens must have been seen."""

LEAST_PERCENT = (66, 50, 50, 50)
"""How often the most frequent token must have followed them."""


class NgramCache:
    """Drafts token by token from the longest n-gram whose continuation is frequent enough.

    Tokens are counted in the pieces in which passes emit them, and n-grams across two pieces are not counted; so
    the prompt has most of them. A new prompt is counted from where the longest text so far ended. Of two tokens that
    followed equally often, the one that was seen later is drafted: the order of the hash tables of GNU's C++ library.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[int, ...], dict[int, int]] = {}
        self._counted = 0

    def begin(self, text: Tokens, length: int) -> None:
        pass

    def draft(self, text: Tokens, length: int) -> list[int]:
        known = length + 1
        if self._counted < known:
            self._count(text[self._counted : known])
            self._counted = known
        if known < LONGEST:
            return []
        end = list(text[known - LONGEST : known])
        drafted: list[int] = []
        while len(drafted) < SIZE:
            token = self._likeliest(end)
            if token is None:
                break
            drafted.append(token)
            end = [*end[1:], token]
        return drafted

    def accepted(self, count: int) -> None:
        pass

    def _count(self, piece: Tokens) -> None:
        for n in range(1, LONGEST + 1):
            for place in range(n, len(piece)):
                followed = self._counts.setdefault(tuple(piece[place - n : place]), {})
                followed[piece[place]] = followed.get(piece[place], 0) + 1

    def _likeliest(self, end: list[int]) -> int | None:
        for n in range(LONGEST, 0, -1):
            followed = self._counts.get(tuple(end[LONGEST - n :]))
            if followed is None:
                continue
            most, total = max(followed.values()), sum(followed.values())
            if total >= LEAST_SEEN[n - 1] and 100 * most >= LEAST_PERCENT[n - 1] * total:
                return next(token for token in reversed(followed) if followed[token] == most)
        return None
