"""The text of a grammar in llguidance's dialect of Lark, rule by rule."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from specplug.errors import UsageError

MAX_CHARS = 512 * 1024
"""Of a grammar: a hundred tools with ten arguments each have 150 KiB."""


class Rules:
    """The rules of one grammar.

    marks  ids of the texts that are control tokens, which a grammar writes by their ids
    """

    def __init__(self, marks: Mapping[str, int]) -> None:
        self._marks = marks
        self._rules: dict[str, str] = {}
        self._size = 0
        self._splits = re.compile("|".join(f"({re.escape(mark)})" for mark in sorted(marks, key=len, reverse=True)))

    def __contains__(self, name: str) -> bool:
        return name in self._rules

    def text(self) -> str:
        """The grammar."""
        return "".join(f"{name}: {body}\n" for name, body in self._rules.items())

    def add(self, name: str, body: str) -> str:
        """Add a rule, or a terminal, whose name is in capitals, and return its name.

        Raises UsageError where the grammar becomes too large.
        """
        self._rules[name] = body
        self._size += len(name) + len(body)
        if self._size > MAX_CHARS:
            raise UsageError(f"the grammar would have more than {MAX_CHARS // 1024} KiB; send smaller or fewer tools")
        return name

    def lazy(self, name: str, body: str) -> str:
        """Add a terminal that ends at its first match, and wins there over longer ones."""
        return self.add(f"{name}[lazy]", body).partition("[")[0]

    def literal(self, text: str) -> str:
        """A text, as part of a rule; empty for an empty one."""
        parts = self._splits.split(text) if self._marks else [text]
        written = [f"<[{self._marks[part]}]>" if part in self._marks else json.dumps(part) for part in parts if part]
        return " ".join(written)

    def json(self, schema: Mapping[str, Any]) -> str:
        """A JSON document of a schema, which has llguidance's options in it, as part of a rule."""
        return f"%json {json.dumps(schema)}"
