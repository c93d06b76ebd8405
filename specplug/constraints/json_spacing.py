"""The spaces between the parts of JSON that may be incomplete: those it has, and the same text with others.

Works on bytes, and knows neither schemas nor tokens. The JSON is that within brackets; what stands before, between or
after is other text, which is not touched, and neither are strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_PARTS = re.compile(rb'"(?:[^"\\]|\\.)*"?| *[,:] *| +|[\[{]|[\]}]|[^",: \[\]{}]+', re.DOTALL)
"""Strings, of which the last one may be unfinished; separators with the spaces around them; other spaces; brackets;
the rest."""

_OPENING = re.compile(rb"[\[{]")


@dataclass(frozen=True, slots=True)
class Spacing:
    """What separates the items of a list or the members of an object, and a key from its value."""

    item: str
    key: str


PYTHONS = Spacing(", ", ": ")
"""That of Python's `json`, to which models keep most often."""


def spacing_of(text: bytes) -> Spacing:
    """The separators that the JSON in a text had last, and Python's where it had none.

    A separator at the end of the text does not count, as the spaces after it may be missing yet.
    """
    found = {b",": PYTHONS.item, b":": PYTHONS.key}
    for part, in_json in list(_parts(text))[:-1]:
        if in_json and (mark := part.strip(b" ")) in found:
            found[mark] = part.decode()
    return Spacing(found[b","], found[b":"])


def respaced(text: bytes, spacing: Spacing) -> bytes:
    """The text whose JSON has these separators and no other spaces; at its end only the spaces that it has."""
    separators = {b",": spacing.item.encode(), b":": spacing.key.encode()}
    parts = list(_parts(text))
    written: list[bytes] = []
    for place, (part, in_json) in enumerate(parts):
        mark = part.strip(b" ")
        if in_json and mark in separators:
            separator = separators[mark]
            if place == len(parts) - 1:
                before, _, after = separator.partition(mark)
                separator = before + mark + after[: len(part) - len(part.rstrip(b" "))]
            written.append(separator)
        elif mark or not in_json:
            written.append(part)
    return b"".join(written)


def _parts(text: bytes) -> Iterator[tuple[bytes, bool]]:
    """The parts of JSON, and the texts outside of it; and of each whether it is one of JSON."""
    at = 0
    while opening := _OPENING.search(text, at):
        if opening.start() > at:
            yield text[at : opening.start()], False
        depth, at = 0, opening.start()
        for part in _PARTS.finditer(text, at):
            at = part.end()
            yield part[0], True
            depth += (part[0] in (b"[", b"{")) - (part[0] in (b"]", b"}"))
            if not depth:
                break
    if at < len(text):
        yield text[at:], False
