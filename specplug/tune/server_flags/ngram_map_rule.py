"""llama-server's `ngram-map-k` and `ngram-map-k4v`: lookup with a memory of which drafts were accepted.

Knows tokens only. Source: llama.cpp's common/ngram-map.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from specplug.tune.server_flags.lookup_rules import Tokens

FACTOR = 2654435761
"""Of the hash of an n-gram, 32 bits."""

BUCKETS = 1 << 18
"""Of the table from hashes to places. The first n-gram of a bucket stays: others with its hash are not found there."""

MOST_VALUES = 4
"""Continuations that are counted for each n-gram."""

MOST_COUNTED = 16380
"""Counters end here."""


@dataclass(slots=True)
class _Value:
    """A continuation: where it begins (0 for none), how often it was seen, and what was accepted of its last draft."""

    place: int = 0
    seen: int = 0
    accepted: int = 0


@dataclass(slots=True)
class _Key:
    """An n-gram that occurred again: its place, up to where its continuations are counted, how often it was looked up.

    Its tokens are those that stand at its place now.
    """

    place: int
    counted: int
    looked_up: int
    values: list[_Value] = field(default_factory=list)


class NgramMap:
    """A map from n-grams of `size_n` tokens to the `size_m` tokens that followed them.

    key_only  `ngram-map-k`, which drafts what followed; else `ngram-map-k4v`, which counts up to four continuations of
              each n-gram and drafts only where one is at least twice as frequent as all others together, from the
              `min_hits`-th lookup on
    A draft is never longer than what was accepted of the last one of the same n-gram, so an n-gram whose draft was
    rejected entirely drafts no more.
    """

    def __init__(self, size_n: int, size_m: int, *, key_only: bool, min_hits: int = 1) -> None:
        self._n = size_n
        self._m = size_m
        self._key_only = key_only
        self._min_hits = min_hits
        self._keys: list[_Key] = []
        self._places: dict[int, int] = {}
        self._last_place = 0
        self._begun_at = 0
        self._last_length = 0
        self._used: _Value | None = None

    def begin(self, text: Tokens, length: int) -> None:
        kept = self._begun_at
        if kept > length:
            kept = max(0, length - self._n - self._m)
        if length < self._last_length:
            self._places = {bucket: place for bucket, place in self._places.items() if place < kept}
            self._last_place = max(0, kept - 1)
            self._keys = [key for key in self._keys if key.place < kept and self._keeps_values(key, kept)]
        self._last_length = self._begun_at = length

    def draft(self, text: Tokens, length: int) -> list[int]:
        self._used = None
        n, m = self._n, self._m
        if length < 2 * n + m:
            return []
        self._last_length = length
        wanted = list(text[length - n + 1 : length + 1])
        found = self._find(text, length, wanted)
        self._add_places(text, length)
        if not found:
            return []
        key = self._key(text, wanted, found)
        key.looked_up = min(key.looked_up + 1, MOST_COUNTED)
        if self._key_only:
            value = key.values[0]
        else:
            if key.looked_up < self._min_hits:
                return []
            self._count(text, key, wanted, found)
            value = max(key.values, key=lambda one: one.seen)
            others = sum(one.seen for one in key.values) - value.seen
            if others and value.seen < 2 * others:
                return []
        self._used = value
        return list(text[found + n : found + n + min(m, value.accepted)])

    def accepted(self, count: int) -> None:
        if self._used is not None:
            self._used.accepted = count

    def _keeps_values(self, key: _Key, kept: int) -> bool:
        """Whether a key has continuations before `kept`; those behind it are removed."""
        if self._key_only:
            return True
        remaining = [value for value in key.values if value.place < kept or not value.place]
        key.values = remaining + [_Value() for _ in range(MOST_VALUES - len(remaining))]
        return key.values[0].place != 0

    def _spans(self, length: int) -> tuple[range, range]:
        """The places that are not in the table yet, newest first: those of the prompt, and those of the answer."""
        last = length - self._n - self._m - 1
        prompt = self._begun_at - self._n - self._m - 1 if self._begun_at > self._n + self._m + 1 else 0
        return (
            range(prompt, self._last_place, -1),
            range(last, max(self._begun_at, self._last_place), -1),
        )

    def _find(self, text: Tokens, length: int, wanted: list[int]) -> int:
        """Where the n-gram stands: by the table, else in the prompt, else in the answer; 0 for nowhere."""
        n = self._n
        place = self._places.get(_bucket(wanted), 0)
        if place and place < length - n - self._m - 1 and list(text[place : place + n]) == wanted:
            return place
        for span in self._spans(length):
            for place in span:
                if text[place] == wanted[0] and list(text[place : place + n]) == wanted:
                    return place
        return 0

    def _add_places(self, text: Tokens, length: int) -> None:
        for span in self._spans(length):
            for place in span:
                self._places.setdefault(_bucket(text[place : place + self._n]), place)
        self._last_place = max(self._last_place, length - self._n - self._m - 1)

    def _key(self, text: Tokens, wanted: list[int], found: int) -> _Key:
        """The key of the n-gram, or a new one at the place where it was found."""
        for key in self._keys:
            if text[key.place] == wanted[0] and list(text[key.place : key.place + self._n]) == wanted:
                return key
        self._keys.append(_Key(found, 0, 0, [_Value(accepted=self._m) for _ in range(MOST_VALUES)]))
        return self._keys[-1]

    def _count(self, text: Tokens, key: _Key, wanted: list[int], found: int) -> None:
        """Count the continuations of the n-gram up to the place where it was found."""
        n, m = self._n, self._m
        for place in range(key.counted, found + 1):
            if text[place] != wanted[0] or list(text[place : place + n]) != wanted:
                continue
            for value in key.values:
                if not value.place:
                    value.place, value.seen, value.accepted = place + n, 0, m
                elif text[place + n : place + n + m] != text[value.place : value.place + m]:
                    continue
                value.seen = min(value.seen + 1, MOST_COUNTED)
                break
        key.counted = found


def _bucket(tokens: Tokens) -> int:
    found = 0
    for token in tokens:
        found = (found * FACTOR + token) & 0xFFFFFFFF
    return found % BUCKETS
