"""A text that arrives in pieces, read as if it were complete.

Readers are generators that pause where the text so far does not decide, and resume when there is more. So what they
read does not depend on how the text was split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from specplug.generation.text import overlap

Result = TypeVar("Result")
Read = Generator[None, None, Result]
"""Pauses for more text any number of times, then returns a result."""

SPACE = re.compile(r"\s*")


class PartialText:
    """The text from the place `at` on that a reader has not passed.

    ended  no more text will come
    """

    def __init__(self, text: str = "", *, ended: bool = False) -> None:
        self.text = text
        self.at = 0
        self.ended = ended

    def cut(self) -> str:
        """Forget the text before this place, and return it."""
        passed, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        return passed

    def peek(self) -> Read[str]:
        """The next character; empty at the end."""
        while self.at >= len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def run(self, pattern: re.Pattern[str], emit: Callable[[str], None] | None = None) -> Read[str]:
        """Pass what matches `pattern`, of which every beginning and every continuation of a match is a match.

        emit  receives it piece by piece
        """
        found = ""
        while True:
            match = pattern.match(self.text, self.at)
            piece = match[0] if match else ""
            self.at += len(piece)
            if emit is not None:
                emit(piece)
            else:
                found += piece
            if self.at < len(self.text) or self.ended:
                return found
            yield

    def space(self) -> Read[str]:
        return (yield from self.run(SPACE))

    def literal(self, text: str) -> Read[bool]:
        """Pass `text` if it comes next; false otherwise. A beginning of it that ends the whole text is passed, too."""
        while True:
            ahead = self.text[self.at : self.at + len(text)]
            if not text.startswith(ahead):
                return False
            if ahead == text or self.ended:
                self.at += len(ahead)
                return ahead == text
            yield

    def find(self, texts: Sequence[str], begin: int) -> tuple[int, str]:
        """Where the first of `texts` begins from `begin` on, and which it is.

        Without one it is empty, and the place is where one may begin that is not complete.
        """
        found = [(at, text) for text in texts if (at := self.text.find(text, begin)) >= 0]
        whole = min(found, default=(len(self.text), ""))
        if self.ended:
            return whole
        longest = max(map(len, texts), default=0)
        tail = self.text[max(begin, len(self.text) - longest) :]
        partial = len(self.text) - max((overlap(tail, text) for text in texts), default=0)
        return whole if whole[0] <= partial else (partial, "")

    def until(self, texts: Sequence[str], emit: Callable[[str], None]) -> Read[str]:
        """Pass everything up to the first of `texts`, and that too, which is returned; empty at the end of all text.

        emit  receives what comes before, piece by piece
        """
        while True:
            place, text = self.find(texts, self.at)
            if place > self.at:
                emit(self.text[self.at : place])
            self.at = place + len(text)
            if text or self.ended:
                return text
            yield
