"""How llama-server and vLLM look up drafts in the text so far: the two rules that keep no state across answers.

Knows tokens only; says what a server would draft, and runs no model. The rules with a memory are in ngram_map_rule.py,
ngram_mod_rule.py and ngram_cache_rule.py.
Source: llama.cpp's common/ngram-map.cpp and common/speculative.cpp, vLLM's v1/spec_decode/ngram_proposer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Tokens = Sequence[int]


class LookupRule(Protocol):
    """A method of a server that drafts from text. Texts are given complete, and a rule reads only what is known.

    A state that lives across answers belongs to one slot of a server, which answers one request after the other.
    """

    def begin(self, text: Tokens, length: int) -> None:
        """The prompt `text[:length]` has been read."""

    def draft(self, text: Tokens, length: int) -> list[int]:
        """What is drafted after the newest token `text[length]`, when `text[:length]` came before it.

        Nothing after `text[length]` is read.
        """

    def accepted(self, count: int) -> None:
        """So many tokens of the latest draft, which was not empty, were accepted."""


class NgramSimple:
    """llama-server's `ngram-simple`: what followed the newest earlier occurrence of the last `size_n` tokens.

    Up to `size_m` tokens. There is no draft where fewer than `size_n` tokens follow the occurrence, at the first token
    of the text, and in texts of at most `size_n + size_m + 1` tokens.
    """

    def __init__(self, size_n: int, size_m: int) -> None:
        self._n = size_n
        self._m = size_m
        self._newest: dict[tuple[int, ...], int] = {}
        self._indexed = 1

    def begin(self, text: Tokens, length: int) -> None:
        self._newest.clear()
        self._indexed = 1

    def draft(self, text: Tokens, length: int) -> list[int]:
        n = self._n
        for start in range(self._indexed, length - n):
            self._newest[tuple(text[start : start + n])] = start
        self._indexed = max(self._indexed, length - n)
        if length <= n + self._m + 1:
            return []
        found = self._newest.get(tuple(text[length - n + 1 : length + 1]), 0)
        if not found or min(self._m, length - found - n) < n:
            return []
        return list(text[found + n : min(found + n + self._m, length)])

    def accepted(self, count: int) -> None:
        pass


class VllmNgram:
    """vLLM's `ngram`: what followed the earliest occurrence of the longest repeated end of the text.

    The end has from `shortest` to `longest` tokens, and the draft up to `size`. vLLM drafts nothing beyond `context`
    tokens.
    """

    def __init__(self, size: int, shortest: int, longest: int, context: int | None = None) -> None:
        self._size = size
        self._lengths = range(longest, shortest - 1, -1)
        self._context = context
        self._earliest: dict[int, dict[tuple[int, ...], int]] = {}
        self._indexed = 0

    def begin(self, text: Tokens, length: int) -> None:
        self._earliest = {n: {} for n in self._lengths}
        self._indexed = 0

    def draft(self, text: Tokens, length: int) -> list[int]:
        total = length + 1
        size = self._size if self._context is None else min(self._size, self._context - total)
        for n, earliest in self._earliest.items():
            for start in range(max(0, self._indexed - n), total - n):
                earliest.setdefault(tuple(text[start : start + n]), start)
        self._indexed = total
        if size <= 0:
            return []
        for n, earliest in self._earliest.items():
            found = earliest.get(tuple(text[total - n : total])) if total > n else None
            if found is not None:
                return list(text[found + n : min(found + n + size, total)])
        return []

    def accepted(self, count: int) -> None:
        pass


class Chain:
    """Several rules of llama-server: the first that drafts anything is used, in the server's fixed order."""

    def __init__(self, rules: Sequence[LookupRule]) -> None:
        self._rules = rules
        self._used: LookupRule | None = None

    def begin(self, text: Tokens, length: int) -> None:
        for rule in self._rules:
            rule.begin(text, length)

    def draft(self, text: Tokens, length: int) -> list[int]:
        for rule in self._rules:
            if drafted := rule.draft(text, length):
                self._used = rule
                return drafted
        return []

    def accepted(self, count: int) -> None:
        if self._used is not None:
            self._used.accepted(count)
