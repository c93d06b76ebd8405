"""Text that a server has sent or printed, as messages, tables and documents may hold it."""

from __future__ import annotations


def one_line(text: str) -> str:
    """The text on one line, without unprintable characters, by which a server could rewrite a terminal."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())
