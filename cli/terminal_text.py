"""Text of a model as it may be shown on a terminal."""

from __future__ import annotations

_CONTROL_CHARACTERS = dict.fromkeys([c for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\t\n\r"])


def for_terminal(text: str) -> str:
    """The text without control characters, by which a model could rewrite the screen."""
    return text.translate(_CONTROL_CHARACTERS)
