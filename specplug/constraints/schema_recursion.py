"""Finds schemas whose values cannot end, such as an object that requires an object of its own schema."""

from __future__ import annotations

from typing import Any

from specplug.constraints.schema_depth import applied, reversed_edges
from specplug.constraints.schema_walk import Node, reachable, referred


def endless(root: Node) -> str | None:
    """The JSON pointer of the innermost schema that every value of `root` contains without end; None where it ends.

    What this module cannot decide counts as ending.
    """
    nodes = dict(reachable(root))
    by_id = {id(node): node for node in nodes.values()}
    outer = reversed_edges({key: list(map(id, applied(root, node))) for key, node in by_id.items()})
    ends: set[int] = set()
    waiting = list(by_id)
    while waiting:
        key = waiting.pop()
        if key not in ends and _ends(root, by_id[key], ends):
            ends.add(key)
            waiting += outer.get(key, ())
    if id(root) in ends:
        return None
    stuck = [pointer for pointer, node in nodes.items() if id(node) not in ends]
    return max(stuck, key=lambda pointer: pointer.count("/"))


def _ends(root: Node, node: Node, ends: set[int]) -> bool:
    """Whether a value of `node` can be complete, given the schemas with values that can be."""

    def done(schema: Any) -> bool:
        return not isinstance(schema, dict) or id(schema) in ends

    target = referred(root, node.get("$ref"))
    if target is not None and not done(target[1]):
        return False
    if not all(done(one) for one in _list(node.get("allOf"))):
        return False
    for key in ("anyOf", "oneOf"):
        if _list(node.get(key)) and not any(done(one) for one in node[key]):
            return False
    if "enum" in node or "const" in node:
        return True
    types = node.get("type")
    types = [types] if isinstance(types, str) else _list(types)
    if not types or any(one not in ("object", "array") for one in types):
        return True
    return ("object" in types and _object_ends(node, done)) or ("array" in types and _array_ends(node, done))


def _object_ends(node: Node, done: Any) -> bool:
    properties, others = node.get("properties"), node.get("additionalProperties")
    for name in _list(node.get("required")):
        schema = properties.get(name, others) if isinstance(properties, dict) and isinstance(name, str) else others
        if not done(schema):
            return False
    return True


def _array_ends(node: Node, done: Any) -> bool:
    least = node.get("minItems", 0)
    if not isinstance(least, int) or least < 1:
        return True
    first = _list(node.get("prefixItems")) or _list(node.get("items"))
    rest = node.get("additionalItems") if isinstance(node.get("items"), list) else node.get("items")
    return all(done(one) for one in first[:least]) and (least <= len(first) or done(rest))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
