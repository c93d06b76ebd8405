"""Prepares a JSON schema for llguidance: what it cannot enforce is refused, or left out with a warning.

llguidance names the keyword that it refuses, and not its place, so the places are found here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from math import isinf
from time import perf_counter
from typing import Any

from specplug.constraints.schema_closing import close_objects
from specplug.constraints.schema_recursion import endless
from specplug.constraints.schema_walk import Node, children, everywhere, reachable, referred
from specplug.errors import UsageError

MAX_BYTES = 256 * 1024
"""The largest of the schemas of check-jsonschema that llguidance takes has 190 kB."""

MAX_DEPTH = 100
"""Levels of JSON; llguidance's own parser takes 128."""

Compile = Callable[[str, Mapping[str, Any]], tuple[str, Sequence[str]]]
"""Compiles the text of a schema with options of llguidance; returns an error, or "", and warnings."""

MAX_PROPERTIES = 1000
"""Of one object; the time to compile grows with the square: 0.1 s for these."""

MAX_DIVISOR = 100_000
"""Of `multipleOf`, as an integer without its decimal point: llguidance counts remainders, in 3 us and 90 bytes each."""

_SEARCH_S = 0.3
"""Time to find the place of an error, which large schemas could exceed."""

_MAX_DIGITS = 300
"""Of an integer; the largest float has 309."""

_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MAX_COUNT = 2**31 - 1
_MAX_KEYWORDS = 16
_FOREIGN = "another document is not supported; copy the definition into the schema"
_ROOT = "document"


@dataclass(frozen=True, slots=True)
class PreparedSchema:
    """A schema that llguidance compiles.

    options   llguidance's, beside those of white space
    warnings  what of the schema is not enforced, one line each
    """

    text: str
    options: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def prepare(text: str, *, strict: bool, compiles: Compile) -> PreparedSchema:
    """Check the text of a JSON schema, and close its objects.

    Raises UsageError with one line: for a text that is no schema, or that is beyond the limits, for a schema without
    a value, and where `strict` for a keyword that cannot be enforced. The line names the keyword and its place.
    """
    root = _parse(text)
    _normalise(root)
    close_objects(root)
    _check_references(root)
    _check_sizes(root)
    stuck = endless(root)
    if stuck is not None:
        raise _error("no value can end", stuck, "it requires a value of its own schema")
    attempt = _Attempt(root, compiles)
    warnings = _strip_divisors(root, strict)
    error, _ = attempt.compile(root, lenient=False)
    if not error:
        return PreparedSchema(json.dumps(root), attempt.options(lenient=False), tuple(warnings))
    if strict:
        raise attempt.located(error, lenient=False)
    warnings += _strip_patterns(root, attempt)
    error, found = attempt.compile(root, lenient=True)
    if error:
        raise attempt.located(error, lenient=True)
    for line in found:
        warnings += _places(root, line, attempt)
    return PreparedSchema(json.dumps(root), attempt.options(lenient=True), tuple(dict.fromkeys(warnings)))


def _parse(text: str) -> Node:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise UsageError(f"the JSON schema has more than {MAX_BYTES // 1024} KiB")
    try:
        root = json.loads(text, parse_constant=_no_number, parse_int=_integer, parse_float=_number)
        json.dumps(root, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UsageError("the JSON schema has half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the JSON schema is not JSON: {error}") from None
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        level = [inner for one in level for inner in _inside(one)]
    if level:
        raise UsageError(f"the JSON schema is nested deeper than {MAX_DEPTH}")
    if root is True:
        return {}
    if root is False:
        raise UsageError("the JSON schema is false: it allows no value")
    if not isinstance(root, dict):
        raise UsageError("the JSON schema is neither an object nor true")
    root.pop("x-guidance", None)  # options of llguidance, which are not the client's to choose
    return root


def _inside(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of more than {_MAX_DIGITS} digits")
    return int(text)


def _number(text: str) -> float:
    if isinf(float(text)):
        raise ValueError(f"{text[:20]} is out of range")
    return float(text)


def _normalise(root: Node) -> None:
    """Remove keywords without an effect, and write counts as llguidance expects them."""
    for node in everywhere(root):
        for key in _COUNTS:
            value = node.get(key)
            if isinstance(value, float) and value.is_integer():
                node[key] = value = int(value)
            if key.startswith("max") and isinstance(value, int) and value > _MAX_COUNT:
                del node[key]  # longer than any answer
        for key, idle in (
            ("uniqueItems", node.get("uniqueItems") is False),
            ("not", node.get("not") is False),
            ("propertyNames", node.get("propertyNames") in (True, {})),
            ("unevaluatedProperties", node.get("unevaluatedProperties") in (True, {})),
            ("unevaluatedItems", node.get("unevaluatedItems") in (True, {})),
            ("dependentRequired", node.get("dependentRequired") == {}),
            ("dependentSchemas", node.get("dependentSchemas") == {}),
            ("dependencies", node.get("dependencies") == {}),
            ("minContains", "contains" not in node),
            ("maxContains", "contains" not in node),
            ("then", "if" not in node),
            ("else", "if" not in node),
        ):
            if key in node and idle:
                del node[key]
        if "if" in node and "then" not in node and "else" not in node:
            del node["if"]


def _check_references(root: Node) -> None:
    """UsageError for a reference that leads out of the document, or to nothing."""
    named = any(isinstance(node.get(key), str) for node in everywhere(root) for key in ("$id", "$anchor", "id"))
    for pointer, node in reachable(root):
        reference = node.get("$ref")
        if not isinstance(reference, str) or named:
            continue
        if not reference.startswith("#"):
            raise _error("$ref", pointer, _FOREIGN)
        if referred(root, reference) is None:
            raise _error("$ref", pointer, f"the schema has no {reference[:100]}")


def _check_sizes(root: Node) -> None:
    for pointer, node in reachable(root):
        properties = node.get("properties")
        if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
            raise _error("properties", pointer, f"there are more than {MAX_PROPERTIES}")


def _strip_divisors(root: Node, strict: bool) -> list[str]:
    """Remove each `multipleOf` that costs too much; returns one warning for each, or raises UsageError where strict."""
    warnings = []
    for pointer, node in reachable(root):
        divisor = node.get("multipleOf")
        if isinstance(divisor, int | float) and _integer_part(divisor) > MAX_DIVISOR:
            why = f"{divisor} has too many digits"
            if strict:
                raise _error("multipleOf", pointer, why)
            del node["multipleOf"]
            warnings.append(_ignored("multipleOf", pointer, why))
    return warnings


def _integer_part(number: int | float) -> int:
    """A number without its decimal point."""
    digits = Decimal(str(number)).as_tuple()
    value = int("".join(map(str, digits.digits)))
    return int(value * 10 ** min(max(int(digits.exponent), 0), 20))


class _Attempt:
    """Compiles a schema, and finds the place of an error."""

    def __init__(self, root: Node, compiles: Compile) -> None:
        self._root = root
        self._compiles = compiles
        self._until: float | None = None

    def options(self, *, lenient: bool) -> Mapping[str, Any]:
        return {"lenient": lenient, "coerce_one_of": lenient}

    def compile(self, schema: Node, *, lenient: bool) -> tuple[str, Sequence[str]]:
        return self._compiles(json.dumps(schema), self.options(lenient=lenient))

    def alone(self, node: Node, *, lenient: bool) -> str:
        """The error of a subschema by itself, or ""; also "" where there is no time left to find out."""
        if self._until is None:
            self._until = perf_counter() + _SEARCH_S
        elif perf_counter() > self._until:
            return ""
        document = {"$schema": self._root["$schema"]} if "$schema" in self._root else {}
        error, _ = self.compile(document | _moved(node) | {"$defs": {_ROOT: self._moved_root}}, lenient=lenient)
        return error

    @cached_property
    def _moved_root(self) -> Any:
        return _moved(self._root)

    def located(self, error: str, *, lenient: bool) -> UsageError:
        """The error with the innermost place where it occurs, and the keyword."""
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
                return _error(self._keyword(node, error, lenient=lenient), pointer, error)

    def _keyword(self, node: Node, error: str, *, lenient: bool) -> str:
        """The keywords that the error names; or those without which there is none."""
        named = [key for key in node if f'"{key}"' in error or f"'{key}'" in error or key in error.split()]
        if not named and len(node) <= _MAX_KEYWORDS:
            for key in node:
                rest = {name: value for name, value in node.items() if name != key}
                if not self.alone(rest, lenient=lenient):
                    named.append(key)
        return " and ".join(named) or "the schema"


def _moved(value: Any) -> Any:
    """A part of a document as it reads in another one, which contains the document as the definition _ROOT."""
    if isinstance(value, list):
        return [_moved(one) for one in value]
    if not isinstance(value, dict):
        return value
    moved = {
        key: _moved(inner) for key, inner in value.items() if key not in ("$id", "id") or not isinstance(inner, str)
    }
    reference = value.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = f"#/$defs/{_ROOT}{reference[1:]}"
    return moved


def _strip_patterns(root: Node, attempt: _Attempt) -> list[str]:
    """Remove the patterns that do not compile; returns one warning for each."""
    warnings = []
    for pointer, node in list(reachable(root)):
        if isinstance(node.get("pattern"), str):
            error, _ = attempt.compile({"type": "string", "pattern": node["pattern"]}, lenient=True)
            if _is_of_regex(error):
                del node["pattern"]
                warnings.append(_ignored("pattern", pointer, _one_line(error)))
        named = node.get("patternProperties")
        if not isinstance(named, dict):
            continue
        for pattern in list(named):
            error, _ = attempt.compile({"type": "string", "pattern": pattern}, lenient=True)
            if _is_of_regex(error):
                del named[pattern]
                warnings.append(_ignored("patternProperties", pointer, _one_line(error)))
    return warnings


def _is_of_regex(error: str) -> bool:
    return error.startswith("regex parse error")


def _places(root: Node, warning: str, attempt: _Attempt) -> list[str]:
    """One of llguidance's warnings as lines with the places of the keyword."""
    warning = re.sub(r" \(\d+ times\)$", "", warning)
    keys = re.findall(r'"([^"]+)"', warning) if warning.startswith("Unimplemented keys") else []
    lines = []
    for pointer, node in reachable(root):
        lines += [_ignored(key, pointer) for key in keys if key in node]
        if warning.startswith("Unknown format") and node.get("format") == warning.partition(": ")[2]:
            lines.append(_ignored(f"format {node['format']}", pointer))
        elif warning.startswith("oneOf") and "oneOf" in node and attempt.alone({"oneOf": node["oneOf"]}, lenient=False):
            lines.append(f"oneOf at #{pointer} is taken as anyOf")
        elif warning.startswith("min/maxProperties"):
            lines += [_ignored(key, pointer) for key in ("minProperties", "maxProperties") if key in node]
    return lines or [warning]


def _ignored(keyword: str, pointer: str, why: str = "") -> str:
    return f"{keyword} at #{pointer} is not enforced" + (f": {why}" if why else "")


def _error(keyword: str, pointer: str, why: str) -> UsageError:
    return UsageError(f"JSON schema: {keyword} at #{pointer}: {_one_line(why)}")


def _one_line(error: str) -> str:
    """The first line of a message; of one about a regular expression, its reason."""
    if _is_of_regex(error) and "error: " in error:
        error = error.rpartition("error: ")[2]
    first = error.strip().partition("\n")[0]
    if first.startswith("Unimplemented keys"):
        return "it cannot be enforced; remove it, or leave out strict"
    if first.startswith("oneOf"):
        return "it cannot be enforced where its schemas overlap; use anyOf, or leave out strict"
    if first.startswith("Resource"):
        return _FOREIGN
    first = first.replace(f"json-schema:///#/$defs/{_ROOT}", "#")
    first = re.sub(r"Regex is empty:.*", "no text satisfies it", first)
    return re.sub(r" at line 1 column \d+$", "", first)[:300]
