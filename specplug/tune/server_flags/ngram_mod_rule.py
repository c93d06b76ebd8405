"""llama-server's `ngram-mod`: a table from hashes of n-grams to the token that followed, shared by all answers.

Knows tokens only. Source: llama.cpp's common/ngram-mod.cpp and common/speculative.cpp.
"""

from __future__ import annotations

from specplug.tune.server_flags.lookup_rules import Tokens

FACTOR = 6364136223846793005
"""Of the hash, 64 bits."""

ENTRIES = 4 << 20
"""Of the table. n-grams of one hash share an entry."""

FULL = 0.25
"""Share of entries in use from which the table is emptied before an answer."""

PIECE = 32
"""New tokens are entered so many at a time."""

LOW = 0.25
"""A draft of which less was accepted counts as bad."""

MOST_LOW = 5
"""So many bad drafts in a row empty the table."""


class NgramMod:
    """Drafts token by token while the last `n_match` tokens have an entry, up to `n_max` tokens.

    There is no draft where fewer than `n_min` tokens come out.
    """

    def __init__(self, n_match: int, n_min: int, n_max: int) -> None:
        self._n = n_match
        self._min = n_min
        self._max = n_max
        self._leading: int = pow(FACTOR, n_match - 1, 1 << 64)
        self._next: dict[int, int] = {}
        self._entered = 0
        self._drafted = 0
        self._low = 0

    def begin(self, text: Tokens, length: int) -> None:
        self._entered = self._drafted = 0
        if length < self._n:
            return
        self._enter(text, 0, length - self._n)
        self._entered = length - self._n
        if len(self._next) > FULL * ENTRIES:
            self._next.clear()

    def draft(self, text: Tokens, length: int) -> list[int]:
        self._drafted = 0
        n = self._n
        if length < n:
            return []
        if self._entered + PIECE < length:
            self._enter(text, self._entered, length - n)
            self._entered = length - n
        window = list(text[length - n + 1 : length + 1])
        key = self._hash(window)
        while len(window) < n + self._max:
            token = self._next.get(key % ENTRIES)
            if token is None:
                if len(window) - n < self._min:
                    return []
                break
            key = self._rolled(key, window[-n], token)
            window.append(token)
        self._drafted = len(window) - n
        return window[n:]

    def accepted(self, count: int) -> None:
        if not self._drafted:
            return
        if count / self._drafted >= LOW:
            self._low = 0
            return
        self._low += 1
        if self._low >= MOST_LOW:
            self._next.clear()
            self._low = self._entered = 0

    def _enter(self, text: Tokens, first: int, last: int) -> None:
        """Enter the n-grams that begin at the places from `first` on, up to but not including `last`."""
        if first >= last:
            return
        key = self._hash(text[first : first + self._n])
        for place in range(first, last):
            self._next[key % ENTRIES] = text[place + self._n]
            key = self._rolled(key, text[place], text[place + self._n])

    def _hash(self, tokens: Tokens) -> int:
        found = 0
        for token in tokens:
            found = found * FACTOR + token
        return found % (1 << 64)

    def _rolled(self, key: int, first: int, token: int) -> int:
        """The hash of the n-gram one token further on."""
        return ((key - first * self._leading) * FACTOR + token) % (1 << 64)
