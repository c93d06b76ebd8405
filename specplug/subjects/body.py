"""A JSON object that a server sent, read with the types that its fields must have. It knows no field by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeVar

from specplug.subjects.subject import SubjectError

Kind = TypeVar("Kind")

WORDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


@dataclass(frozen=True, slots=True)
class Body:
    """One object. A field that is missing or null is empty; one of another type than asked for is a SubjectError.

    server  what messages call the server
    """

    server: str
    fields: Mapping[str, Any]

    def text(self, key: str) -> str:
        return self._read(key, str) or ""

    def whole(self, key: str) -> int | None:
        return self._read(key, int)

    def wholes(self, key: str) -> list[int]:
        return [self._checked(key, one, int) for one in self._read(key, list) or ()]

    def number(self, key: str) -> float:
        """A finite number, which may not be missing."""
        found = self.fields.get(key)
        if isinstance(found, bool) or not isinstance(found, int | float) or not isfinite(found):
            raise self._fault(key, "no finite number")
        return float(found)

    def part(self, key: str) -> Body:
        return Body(self.server, self._read(key, dict) or {})

    def parts(self, key: str) -> list[Body]:
        return [Body(self.server, self._checked(key, one, dict)) for one in self._read(key, list) or ()]

    def _read(self, key: str, kind: type[Kind]) -> Kind | None:
        found = self.fields.get(key)
        return None if found is None else self._checked(key, found, kind)

    def _checked(self, key: str, found: object, kind: type[Kind]) -> Kind:
        if not isinstance(found, kind) or isinstance(found, bool):
            raise self._fault(key, f"not {WORDS[kind]}")
        return found

    def _fault(self, key: str, what: str) -> SubjectError:
        return SubjectError(f"{self.server}: the field {key} of an answer is, or has in it, {what}")
