"""Finds the place of what llguidance cannot enforce in a JSON schema: it names the keyword, and not its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from time import thread_time
from typing import Any

from specplug.constraints.schema_walk import WHOLE, Node, children, moved, reachable, referred
from specplug.errors import UsageError

Compile = Callable[[str, Mapping[str, Any]], tuple[str, Sequence[str]]]
"""Compiles the text of a schema with options of llguidance; returns an error, or "", and warnings."""

FOREIGN = "another document is not supported; copy the definition into the schema"

_SEARCH_S = 0.3
"""Time to find the place of an error, which large schemas could exceed."""

_MAX_KEYWORDS = 16
_SIZES = ("minProperties", "maxProperties")


class Attempt:
    """Compiles a schema, and finds the place of an error."""

    def __init__(self, root: Node, compiles: Compile) -> None:
        self._root = root
        self._compiles = compiles
        self._until: float | None = None

    def options(self, *, lenient: bool) -> Mapping[str, Any]:
        return {"lenient": lenient, "coerce_one_of": lenient}

    def compile(self, schema: Node, *, lenient: bool) -> tuple[str, Sequence[str]]:
        return self._compiles(json.dumps(schema), self.options(lenient=lenient))

    def alone(self, node: Node, *, lenient: bool) -> str | None:
        """The error of a subschema by itself, or ""; None where there is no time left to find out."""
        if self._until is None:
            self._until = thread_time() + _SEARCH_S
        elif thread_time() > self._until:
            return None
        document = {"$schema": self._root["$schema"]} if "$schema" in self._root else {}
        error, _ = self.compile(document | moved(node) | {"$defs": {WHOLE: self._moved_root}}, lenient=lenient)
        return error

    @cached_property
    def _moved_root(self) -> Any:
        return moved(self._root)

    def located(self, error: str, *, lenient: bool) -> UsageError:
        """The error with the innermost place where it occurs, and the keyword."""
        for pointer, node in reachable(self._root):
            if keywords := _keywords_of(error, node):
                return error_at(" and ".join(keywords), pointer, error)
        pointer, node, seen = "", self._root, {id(self._root)}
        while True:
            inner = [(pointer + below, child) for below, child in children(node)]
            target = referred(self._root, node.get("$ref"))
            if target is not None:
                inner.append(target)
            for below, child in inner:
                if not isinstance(child, dict) or id(child) in seen:
                    continue
                seen.add(id(child))
                found = self.alone(child, lenient=lenient)
                if found:
                    pointer, node, error = below, child, found
                    break
            else:
                break
        return error_at(self._keyword(node, error, lenient=lenient), pointer, error)

    def _keyword(self, node: Node, error: str, *, lenient: bool) -> str:
        """The keywords that the error names; or those without which there is none."""
        if error.startswith("min/maxProperties"):
            return " and ".join(key for key in _SIZES if key in node) or "properties"
        named = [key for key in node if f'"{key}"' in error or f"'{key}'" in error or key in error.split()]
        if not named and len(node) <= _MAX_KEYWORDS:
            for key in node:
                rest = {name: value for name, value in node.items() if name != key}
                if self.alone(rest, lenient=lenient) == "":
                    named.append(key)
        return " and ".join(named) or "the schema"


def _keywords_of(error: str, node: Node) -> list[str]:
    """The keywords of a schema that one of llguidance's errors is about, for errors that leave no doubt."""
    if error.startswith("Unimplemented keys"):
        return [key for key in unimplemented(error) if key in node]
    if error.startswith("Unknown format"):
        return [f"format {node['format']}"] if node.get("format") == unknown_format(error) else []
    if is_circular(error):
        return ["$ref"] if node.get("$ref") == circular_reference(error) and len(node) > 1 else []
    return []


def unimplemented(message: str) -> list[str]:
    """The keywords that a message of llguidance lists."""
    return re.findall(r'"([^"]+)"', message)


def unknown_format(message: str) -> str:
    return message.partition(": ")[2].strip()


def is_circular(error: str) -> bool:
    return error.startswith("circular references with sibling keys")


def circular_reference(error: str) -> str:
    """The `$ref` that such an error is about."""
    return "#" + error.strip().partition("\n")[0].rpartition("#")[2]


def is_of_regex(error: str) -> bool:
    return error.startswith("regex parse error")


def is_of_overlap(error: str) -> bool:
    """Whether two of the names in patternProperties could match one property."""
    return error.startswith("patternProperty regexes")


def places(root: Node, warning: str, attempt: Attempt) -> list[str]:
    """One of llguidance's warnings as lines with the places of the keyword."""
    warning = re.sub(r" \(\d+ times\)$", "", warning)
    lines = []
    for pointer, node in reachable(root):
        lines += [ignored(key, pointer) for key in _keywords_of(warning, node)]
        if (
            warning.startswith("oneOf")
            and "oneOf" in node
            and attempt.alone({"oneOf": node["oneOf"]}, lenient=False) != ""
        ):
            lines.append(f"oneOf at #{_shown(pointer)} is taken as anyOf")
        elif warning.startswith("min/maxProperties"):
            lines += [ignored(key, pointer) for key in _SIZES if key in node]
    return lines or [warning]


def ignored(keyword: str, pointer: str, why: str = "") -> str:
    """The warning that a keyword is not enforced."""
    return f"{_shown(keyword)} at #{_shown(pointer)} is not enforced" + (f": {one_line(why)}" if why else "")


def error_at(keyword: str, pointer: str, why: str) -> UsageError:
    """The error about a keyword, in one line."""
    return UsageError(f"JSON schema: {_shown(keyword)} at #{_shown(pointer)}: {one_line(why)}")


def _shown(name: str) -> str:
    """A name of the client's choice as a part of one line."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


def one_line(error: str) -> str:
    """The first line of a message; of one about a regular expression, its reason."""
    if is_of_regex(error) and "error: " in error:
        error = error.rpartition("error: ")[2]
    first = error.strip().partition("\n")[0]
    if first.startswith("Unimplemented keys"):
        return "it cannot be enforced; remove it, or leave out strict"
    if first.startswith("oneOf"):
        return "it cannot be enforced where its schemas overlap; use anyOf, or leave out strict"
    if first.startswith("Resource"):
        return FOREIGN
    first = first.replace(f"json-schema:///#/$defs/{WHOLE}", "#").replace("json-schema:///#", "#")
    first = re.sub(r"Regex is empty:.*", "no text satisfies it", first)
    return re.sub(r" at line 1 column \d+$", "", first)[:300]
