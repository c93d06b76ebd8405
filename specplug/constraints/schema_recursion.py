"""Finds schemas whose values cannot end, such as an object that requires an object of its own schema."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specplug.constraints.schema_walk import Node, reachable, referred


def endless(root: Node) -> str | None:
    """The JSON pointer of the innermost schema that every value of `root` contains without end; None where it ends.

    What this module cannot decide counts as ending.
    """
    nodes = list(reachable(root))
    ends = _ending({id(node): _clauses(root, node) for _, node in nodes})
    if id(root) in ends:
        return None
    stuck = [pointer for pointer, node in nodes if id(node) not in ends]
    return max(stuck, key=lambda pointer: pointer.count("/"))


Clause = list[list[Any]]
"""Alternatives, of which one has to hold: schemas that all need values which end."""


@dataclass(slots=True)
class _Alternative:
    """`left`: how many of its schemas are not known to end; `clause`: its place among those of all schemas."""

    left: int
    clause: int


def _ending(clauses: Mapping[int, Sequence[Clause]]) -> set[int]:
    """The ids of the schemas all clauses of which hold, in time in proportion to the clauses."""
    open_clauses = {key: len(own) for key, own in clauses.items()}
    owner: list[int] = []
    holds: list[bool] = []
    users: dict[int, list[_Alternative]] = defaultdict(list)
    satisfied: list[int] = []
    for key, own in clauses.items():
        for clause in own:
            for alternative in clause:
                schemas = [id(one) for one in alternative if isinstance(one, dict)]
                user = _Alternative(len(schemas), len(owner))
                for one in schemas:
                    users[one].append(user)
                if not schemas:
                    satisfied.append(len(owner))
            owner.append(key)
            holds.append(False)
    waiting = [key for key, count in open_clauses.items() if not count]
    ends = set(waiting)
    while satisfied or waiting:
        while satisfied:
            place = satisfied.pop()
            if not holds[place]:
                holds[place] = True
                open_clauses[owner[place]] -= 1
                if not open_clauses[owner[place]]:
                    ends.add(owner[place])
                    waiting.append(owner[place])
        for user in users[waiting.pop()] if waiting else ():
            user.left -= 1
            if not user.left:
                satisfied.append(user.clause)
    return ends


def _clauses(root: Node, node: Node) -> list[Clause]:
    """What has to hold so that a value of `node` can be complete."""
    target = referred(root, node.get("$ref"))
    found: list[Clause] = [[[target[1]]]] if target is not None else []
    if every := _list(node.get("allOf")):
        found.append([every])
    for key in ("anyOf", "oneOf"):
        if choices := _list(node.get(key)):
            found.append([[one] for one in choices])
    if "enum" in node or "const" in node:
        return found
    types = node.get("type")
    types = [types] if isinstance(types, str) else _list(types)
    if types and all(one in ("object", "array") for one in types):
        needs = {"object": _needed_by_object, "array": _needed_by_array}
        found.append([needs[one](node) for one in types])
    return found


def _needed_by_object(node: Node) -> list[Any]:
    properties, others = node.get("properties"), node.get("additionalProperties")
    return [
        properties.get(name, others) if isinstance(properties, dict) and isinstance(name, str) else others
        for name in _list(node.get("required"))
    ]


def _needed_by_array(node: Node) -> list[Any]:
    least = node.get("minItems", 0)
    if not isinstance(least, int) or least < 1:
        return []
    first = _list(node.get("prefixItems")) or _list(node.get("items"))
    rest = node.get("additionalItems") if isinstance(node.get("items"), list) else node.get("items")
    return first[:least] if least <= len(first) else [*first, rest]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
