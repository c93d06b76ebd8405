"""Closes objects: an object with `properties` has no others, unless its schema says so.

Models write further properties where a schema leaves them open, although hardly any author wants them. Every value of
the closed schema is one of the original. Objects stay open where several schemas with properties apply to one value
(allOf, references with keywords beside them), since each of them would forbid the properties of the others.
"""

from __future__ import annotations

from typing import Any

from specplug.constraints.schema_walk import Node, everywhere, referred

_IN_PLACE = ("allOf", "anyOf", "oneOf")
_SHAPES = ("properties", "patternProperties", "additionalProperties", "required", "minProperties")


def close_objects(root: Node) -> None:
    """Adds `additionalProperties: false` in place, wherever it only removes properties that nobody named."""
    open_ids: set[int] = set()
    for node in everywhere(root):
        parts = _parts(root, node)
        if len(parts) > 1:
            open_ids.update(id(schema) for part in parts for schema in part)
    for node in everywhere(root):
        if id(node) not in open_ids and _can_close(node):
            node["additionalProperties"] = False
            if not any(key in node for key in (*_IN_PLACE, "$ref", "if", "dependentSchemas")):
                node.pop("unevaluatedProperties", None)


def _can_close(node: Node) -> bool:
    properties = node.get("properties")
    if not isinstance(properties, dict) or "additionalProperties" in node:
        return False
    if node.get("unevaluatedProperties", False) is not False:
        return False
    required, least = node.get("required", []), node.get("minProperties", 0)
    if not isinstance(required, list) or not isinstance(least, int):
        return False
    return all(name in properties for name in required if isinstance(name, str)) and least <= len(properties)


def _parts(root: Node, node: Node) -> list[list[Node]]:
    """The groups of schemas of an object's properties that apply to one value together, with `node` as outermost."""
    own = [[node]] if any(key in node for key in _SHAPES) else []
    beside: list[list[Node]] = []
    for key in _IN_PLACE:
        choices = [_shapes(root, one, set()) for one in _list(node.get(key))]
        beside += choices if key == "allOf" else [[schema for choice in choices for schema in choice]]
    if "$ref" in node:
        target = referred(root, node["$ref"])
        beside.append(_shapes(root, target[1], set()) if target is not None else [])
    return own + [part for part in beside if part]


def _shapes(root: Node, node: Any, seen: set[int]) -> list[Node]:
    """The schemas with keywords about properties that apply to the same value as `node`, itself included."""
    if not isinstance(node, dict) or id(node) in seen:
        return []
    seen.add(id(node))
    found = [node] if any(key in node for key in _SHAPES) else []
    for key in _IN_PLACE:
        for one in _list(node.get(key)):
            found += _shapes(root, one, seen)
    target = referred(root, node.get("$ref"))
    if target is not None:
        found += _shapes(root, target[1], seen)
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
