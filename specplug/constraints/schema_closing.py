"""Closes objects: an object with `properties` has no others, unless its schema says so.

Models write further properties where a schema leaves them open, although hardly any author wants them. Every value of
the closed schema is one of the original. Objects stay open where several schemas with properties apply to one value
(allOf, references with keywords beside them), since each of them would forbid the properties of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specplug.constraints.schema_depth import reversed_edges
from specplug.constraints.schema_walk import Node, everywhere, referred

_IN_PLACE = ("allOf", "anyOf", "oneOf")
_SHAPES = ("properties", "patternProperties", "additionalProperties", "required", "minProperties")


def close_objects(root: Node) -> None:
    """Adds `additionalProperties: false` in place, wherever it only removes properties that nobody named."""
    open_ids = _kept_open(root)
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


def _kept_open(root: Node) -> set[int]:
    """The schemas that apply to one value together with another schema that is about an object's properties."""
    groups = _groups(root)
    inner = {key: [one for group in parts for one in group] for key, parts in groups.nodes.items()}
    shaped = _closure(reversed_edges(inner), groups.shaped)
    shared = [
        key
        for key, parts in groups.nodes.items()
        if (key in groups.shaped) + sum(any(one in shaped for one in part) for part in parts) > 1
    ]
    return _closure(inner, shared)


@dataclass(slots=True)
class _Groups:
    """Schemas by their ids.

    nodes   of each, the schemas that apply to the same value: those of one group are alternatives
    shaped  those that are about an object's properties themselves
    """

    nodes: dict[int, list[list[int]]] = field(default_factory=dict)
    shaped: set[int] = field(default_factory=set)


def _groups(root: Node) -> _Groups:
    found = _Groups()
    waiting: list[Any] = list(everywhere(root))
    while waiting:
        node = waiting.pop()
        if id(node) in found.nodes:
            continue
        parts = [[one] for one in _list(node.get("allOf"))]
        parts += [_list(node.get("anyOf")), _list(node.get("oneOf"))]
        target = referred(root, node.get("$ref"))
        if target is not None:
            parts.append([target[1]])
        schemas = [[one for one in part if isinstance(one, dict)] for part in parts]
        found.nodes[id(node)] = [[id(one) for one in part] for part in schemas]
        waiting += [one for part in schemas for one in part]
        if any(key in node for key in _SHAPES):
            found.shaped.add(id(node))
    return found


def _closure(edges: Mapping[int, Sequence[int]], starts: Iterable[int]) -> set[int]:
    """All that edges lead to from `starts`, these included."""
    waiting = list(starts)
    found = set(waiting)
    while waiting:
        for one in edges.get(waiting.pop(), ()):
            if one not in found:
                found.add(one)
                waiting.append(one)
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
