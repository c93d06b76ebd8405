"""Which JSON types an argument may have, by the schema of its function; for families that write strings bare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from specplug.constraints.schema_walk import WHOLE, moved, referred
from specplug.server.tool_formats.json_text import as_json, quoted

Schema = Mapping[str, Any]

ALL = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
STRUCTURED = frozenset({"string", "object", "array"})
"""Those whose values some families do not write as JSON."""

PYTHON = {"True": "true", "False": "false", "None": "null"}
"""What some templates, and so models, write for JSON's constants."""

MAX_REFERENCES = 32


def chain(schema: Any, root: Schema) -> list[tuple[str, Schema]]:
    """A schema within `root` and those that its reference leads to, the last one without a reference.

    Each has its JSON pointer, which is "" for the first. Where there is none, the last is empty and allows everything.
    """
    found: list[tuple[str, Schema]] = []
    pointer = ""
    while len(found) < MAX_REFERENCES and isinstance(schema, Mapping):
        found.append((pointer, schema))
        if "$ref" not in schema:
            return found
        pointer, schema = referred(root, schema["$ref"]) or ("", None)
    return [*found, ("", {})]


def resolved(schema: Any, root: Schema) -> Schema:
    """The schema that `schema` refers to within `root`; empty, which allows everything, where there is none."""
    return chain(schema, root)[-1][1]


def direct(schema: Any, root: Schema) -> Schema:
    """A schema within `root`, or the one that it is nothing but a reference to."""
    return next(node for _, node in chain(schema, root) if set(node) != {"$ref"})


def document(part: Schema, root: Schema) -> Schema:
    """A part of `root` as a document of its own, with the draft and llguidance's options that `root` has."""
    part = direct(part, root)
    carried = {key: root[key] for key in ("$schema", "x-guidance") if key in root}
    if '"$ref"' not in json.dumps(part):
        return {**part, **carried}
    whole = {key: value for key, value in root.items() if key not in carried}
    return {**moved(part), **carried, "$defs": {WHOLE: moved(whole)}}


def types(schema: Any, root: Schema) -> frozenset[str]:
    """JSON types of the values that a schema allows: too many rather than too few."""
    found: set[str] = set()
    waiting, seen = [schema], set[int]()
    while waiting:
        node = resolved(waiting.pop(), root)
        if id(node) in seen:
            continue
        seen.add(id(node))
        given = node.get("type")
        choices = [node["const"]] if "const" in node else node.get("enum")
        inner = [one for key in ("anyOf", "oneOf") if isinstance(node.get(key), list) for one in node[key]]
        if isinstance(given, str | list):
            found.update([given] if isinstance(given, str) else [one for one in given if isinstance(one, str)])
        elif isinstance(choices, list):
            found.update(map(_type_of, choices))
        elif inner:
            waiting += inner
        else:
            return ALL
    return frozenset(found) or ALL


def choices(schema: Schema, allowed: frozenset[str]) -> list[Any]:
    """The values of `const` or `enum` that have an allowed type; empty where the schema lists none."""
    given = [schema["const"]] if "const" in schema else schema.get("enum")
    kinds = allowed | {"integer"} if "number" in allowed else allowed
    return [one for one in given if _type_of(one) in kinds] if isinstance(given, list) else []


def argument(text: str, allowed: frozenset[str]) -> str:
    """The JSON of an argument that a model wrote as `text`, as one of the `allowed` types if it can be read so."""
    if allowed == {"string"}:
        return quoted(text)
    read = as_json(text)
    if read is None and "string" not in allowed:
        read = PYTHON.get(text.strip())
    if read is None or not _may_be(read, allowed):
        return quoted(text)
    return read


def _may_be(read: str, allowed: frozenset[str]) -> bool:
    kind = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}.get(read[0])
    if kind == "string":  # a bare string that has quotes of its own
        return "string" not in allowed
    if kind is None:
        return "number" in allowed or ("integer" in allowed and ("string" not in allowed or _is_integer(read)))
    return kind in allowed


def _is_integer(read: str) -> bool:
    return not set(read) & set(".eE")


def _type_of(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    return names.get(type(value), "null")
