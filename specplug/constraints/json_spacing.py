"""The spaces between the parts of a JSON text that may be incomplete: those it has, and the same text with others.

Works on bytes, and knows neither schemas nor tokens. Spaces inside strings are not touched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PARTS = re.compile(rb'"(?:[^"\\]|\\.)*"?| *[,:] *| +|[^",: ]+', re.DOTALL)
"""Strings, of which the last one may be unfinished; separators with the spaces around them; other spaces; the rest."""


@dataclass(frozen=True, slots=True)
class Spacing:
    """What separates the items of a list or the members of an object, and a key from its value."""

    item: str
    key: str


PYTHONS = Spacing(", ", ": ")
"""That of Python's `json`, to which models keep most often."""


def spacing_of(text: bytes) -> Spacing:
    """The separators that a text had last, and Python's where it had none.

    A separator at the end of the text does not count, as the spaces after it may be missing yet.
    """
    found = {b",": PYTHONS.item, b":": PYTHONS.key}
    parts: list[bytes] = _PARTS.findall(text)
    for part in parts[:-1]:
        if (mark := part.strip(b" ")) in found:
            found[mark] = part.decode()
    return Spacing(found[b","], found[b":"])


def respaced(text: bytes, spacing: Spacing) -> bytes:
    """The text with these separators and without other spaces; at its end only the spaces that it has."""
    separators = {b",": spacing.item.encode(), b":": spacing.key.encode()}
    parts: list[bytes] = _PARTS.findall(text)
    last = len(parts) - 1
    for place, part in enumerate(parts):
        separator = separators.get(part.strip(b" "))
        if separator is not None:
            parts[place] = separator
            if place == last:
                before, mark, after = separator.partition(part.strip(b" "))
                parts[place] = before + mark + after[: len(part) - len(part.rstrip(b" "))]
        elif not part.strip(b" "):
            parts[place] = b""
    return b"".join(parts)
