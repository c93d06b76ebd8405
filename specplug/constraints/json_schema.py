"""Prepares a JSON schema for llguidance: what it cannot enforce is refused, or left out with a warning."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isinf
from time import thread_time
from typing import Any

from specplug.constraints.schema_closing import close_objects
from specplug.constraints.schema_depth import check_depth
from specplug.constraints.schema_errors import (
    FOREIGN,
    Attempt,
    Compile,
    circular_reference,
    error_at,
    ignored,
    is_circular,
    is_of_overlap,
    is_of_regex,
    places,
)
from specplug.constraints.schema_formats import write_formats
from specplug.constraints.schema_names import point_references
from specplug.constraints.schema_numbers import fit_numbers
from specplug.constraints.schema_recursion import endless
from specplug.constraints.schema_walk import DEFINITIONS, KEYWORDS, Node, everywhere, reachable, referred
from specplug.errors import UsageError

MAX_BYTES = 256 * 1024
"""The largest of the schemas of check-jsonschema that llguidance takes has 190 kB."""

MAX_DEPTH = 100
"""Levels of JSON; llguidance's own parser takes 128."""

MAX_PROPERTIES = 1000
"""Of one object; the time to compile grows with the square: 0.1 s for these."""

_MAX_DIGITS = 300
"""Of an integer; the largest float has 309."""

_OVERLAP_S = 0.3
"""Time to find the names in patternProperties that overlap."""

_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MAX_COUNT = 2**31 - 1
_DRAFT = re.compile(r"https?://json-schema\.org/(?:draft-0(?P<number>\d)|draft/(?P<year>2019-09|2020-12))/schema#?/?")
_LATEST = re.compile(r"https?://json-schema\.org/schema#?")
_MOST_CIRCLES = 10


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
    warnings = _set_draft(root, strict=strict)
    point_references(root)
    _normalise(root)
    _check_references(root)
    check_depth(root)
    close_objects(root)
    _check_sizes(root)
    stuck = endless(root)
    if stuck is not None:
        raise error_at("no value can end", stuck, "it requires a value of its own schema")
    write_formats(root)
    warnings += fit_numbers(root, strict=strict)
    attempt = Attempt(root, compiles)
    error, _ = attempt.compile(root, lenient=False)
    if not error:
        return PreparedSchema(json.dumps(root), attempt.options(lenient=False), tuple(warnings))
    if strict:
        raise attempt.located(error, lenient=False)
    error, found = attempt.compile(root, lenient=True)
    if is_of_regex(error) or is_of_overlap(error):
        warnings += _strip_patterns(root, attempt)
        error, found = attempt.compile(root, lenient=True)
    for _ in range(_MOST_CIRCLES):
        if not is_circular(error):
            break
        warnings += _strip_siblings(root, circular_reference(error))
        error, found = attempt.compile(root, lenient=True)
    if error:
        raise attempt.located(error, lenient=True)
    for line in found:
        warnings += places(root, line, attempt)
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


def _set_draft(root: Node, *, strict: bool) -> list[str]:
    """Write `$schema` as llguidance knows it; returns a warning where it names no draft."""
    name = root.get("$schema")
    if name is None:
        return []
    if not isinstance(name, str):
        raise error_at("$schema", "", "Expected string")
    draft = _DRAFT.fullmatch(name)
    if draft and draft["year"]:
        root["$schema"] = f"https://json-schema.org/draft/{draft['year']}/schema"
        return []
    if draft and int(draft["number"]) < 4:
        raise error_at("$schema", "", f"draft {draft['number']} is not supported; use draft 4 or later")
    if draft:
        root["$schema"] = f"http://json-schema.org/draft-0{draft['number']}/schema#"
        return []
    del root["$schema"]
    if not name or _LATEST.fullmatch(name):
        return []
    if strict:
        raise error_at("$schema", "", f"{name[:100]} is no draft of JSON Schema")
    return [ignored("$schema", "", f"{name[:100]} is no draft of JSON Schema")]


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
        if "$ref" in node and node is not root:  # llguidance takes the unknown ones beside it for schemas, too
            for key in [key for key in node if key not in KEYWORDS]:
                del node[key]
        if "if" in node and "then" not in node and "else" not in node:
            del node["if"]


def _check_references(root: Node) -> None:
    """UsageError for a reference that leads out of the document, or to nothing."""
    for pointer, node in reachable(root):
        reference = node.get("$ref")
        if not isinstance(reference, str):
            continue
        if not reference.startswith("#"):
            raise error_at("$ref", pointer, FOREIGN)
        target = referred(root, reference)
        if target is None:
            raise error_at("$ref", pointer, f"the schema has no {reference[:100]}")


def _check_sizes(root: Node) -> None:
    for pointer, node in reachable(root):
        properties = node.get("properties")
        if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
            raise error_at("properties", pointer, f"there are more than {MAX_PROPERTIES}")


def _strip_patterns(root: Node, attempt: Attempt) -> list[str]:
    """Remove the patterns that do not compile, or overlap others; returns one warning for each."""
    warnings = []
    until = thread_time() + _OVERLAP_S
    for pointer, node in list(reachable(root)):
        if isinstance(node.get("pattern"), str):
            error, _ = attempt.compile({"type": "string", "pattern": node["pattern"]}, lenient=True)
            if is_of_regex(error):
                del node["pattern"]
                warnings.append(ignored("pattern", pointer, error))
        named = node.get("patternProperties")
        if not isinstance(named, dict):
            continue
        kept: dict[str, Any] = {}
        for pattern in list(named):
            error, _ = attempt.compile({"type": "string", "pattern": pattern}, lenient=True)
            if not is_of_regex(error):
                error = _overlap(kept | {pattern: True}, attempt, until)
            if error:
                del named[pattern]
                warnings.append(ignored("patternProperties", pointer, error))
            else:
                kept[pattern] = True
    return warnings


def _overlap(patterns: Mapping[str, Any], attempt: Attempt, until: float) -> str:
    """Why an object cannot have these names of properties, or ""; after `until` it can have one only."""
    if len(patterns) < 2:
        return ""
    if thread_time() > until:
        return "there are too many patterns"
    error, _ = attempt.compile({"type": "object", "patternProperties": patterns}, lenient=True)
    return error if is_of_overlap(error) else ""


def _strip_siblings(root: Node, reference: str) -> list[str]:
    """Remove what stands beside a reference that leads to itself; returns one warning for each keyword."""
    warnings = []
    for pointer, node in list(reachable(root)):
        if node.get("$ref") == reference:
            for key in [key for key in node if key in KEYWORDS and key not in ("$ref", "$schema", *DEFINITIONS)]:
                del node[key]
                warnings.append(ignored(key, pointer, "it stands beside a reference that leads to itself"))
    return warnings
