"""Limits for grammars in GBNF, which llama.cpp reads by functions that call themselves for each parenthesis."""

from __future__ import annotations

import re

from specplug.errors import UsageError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 100
"""Parentheses within each other."""

_TEXTS = re.compile(r'"(?:\\.?|[^"\\])*+"?|\[(?:\\.?|[^\]\\])*+\]?|#[^\n]*', re.DOTALL)
"""Literals, classes of characters and comments, in which parentheses mean themselves; unclosed ones go to the end."""


def check_gbnf(grammar: str) -> None:
    """Raise UsageError for a grammar that is too large or nested too deep. Repetitions are limited by llama.cpp."""
    if len(grammar.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise UsageError(f"the grammar has more than {MAX_BYTES // 1024} KiB")
    depth = 0
    for parenthesis in re.findall(r"[()]", _TEXTS.sub("", grammar)):
        depth += 1 if parenthesis == "(" else -1
        if depth > MAX_DEPTH:
            raise UsageError(f"the grammar is nested deeper than {MAX_DEPTH}")
