"""The subschemas of a JSON schema, and the places that references lead to.

Knows which keywords contain schemas and which contain values, and no other meaning of a keyword.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

Node = dict[str, Any]

MAPS = ("properties", "patternProperties", "dependentSchemas")
DEFINITIONS = ("$defs", "definitions")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLE = (
    *("items", "additionalItems", "unevaluatedItems", "contains"),
    *("additionalProperties", "unevaluatedProperties", "propertyNames"),
    *("not", "if", "then", "else"),
)

KEYWORDS = frozenset(
    (
        *(*MAPS, *DEFINITIONS, *LISTS, *SINGLE, "dependencies"),
        *("$schema", "$id", "id", "$anchor", "$ref", "$dynamicRef", "$dynamicAnchor", "$recursiveRef"),
        *("type", "enum", "const", "format", "pattern", "multipleOf"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("minLength", "maxLength", "minItems", "maxItems", "uniqueItems", "minContains", "maxContains"),
        *("required", "dependentRequired", "minProperties", "maxProperties"),
    )
)
"""Those that can make a value invalid, or that lead to such ones."""

WHOLE = "document"
"""The definition that contains the whole document, in a document that one of its parts became."""


def children(node: Node) -> Iterator[tuple[str, Any]]:
    """The subschemas in a schema, without its definitions, each with its JSON pointer from there."""
    for key in MAPS:
        if isinstance(node.get(key), dict):
            yield from ((f"/{key}/{escaped(name)}", inner) for name, inner in node[key].items())
    for key in (*LISTS, "items"):
        if isinstance(node.get(key), list):
            yield from ((f"/{key}/{index}", inner) for index, inner in enumerate(node[key]))
    for key in SINGLE:
        if isinstance(node.get(key), dict):
            yield f"/{key}", node[key]


def reachable(root: Node) -> Iterator[tuple[str, Node]]:
    """The schemas that can be applied to some part of a value, each once, with its JSON pointer; outer ones first.

    Definitions are among them where a `$ref` that begins with `#` leads to them.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        pointer, node = waiting.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        yield pointer, node
        inner = [(pointer + below, child) for below, child in children(node)]
        target = referred(root, node.get("$ref"))
        if target is not None:
            inner.append(target)
        waiting += reversed(inner)


def everywhere(root: Node) -> Iterator[Node]:
    """All schemas of a document, also those that no reference leads to."""
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict):
            continue
        yield node
        waiting += [child for _, child in children(node)]
        for key in DEFINITIONS:
            if isinstance(node.get(key), dict):
                waiting += node[key].values()


def referred(root: Mapping[str, Any], reference: Any) -> tuple[str, Any] | None:
    """Where a `$ref` leads within the document: the pointer and the schema; None for other references."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    pointer = unquote(reference[1:])
    at: Any = root
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(at, dict) and part in at:
            at = at[part]
        elif isinstance(at, list) and part.isdecimal() and int(part) < len(at):
            at = at[int(part)]
        else:
            return None
    return pointer, at


def escaped(name: str) -> str:
    """A name as part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def moved(value: Any) -> Any:
    """A part of a document as it reads in another one, which contains the document as the definition WHOLE."""
    if isinstance(value, list):
        return [moved(one) for one in value]
    if not isinstance(value, dict):
        return value
    copied = {key: moved(inner) for key, inner in value.items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        copied["$ref"] = f"#/$defs/{WHOLE}{reference[1:]}"
    return copied
