"""Limits how long a chain of schemas can be that contain each other or refer to each other.

llguidance compiles a schema by functions that call themselves for each part and each reference, and a stack that
overflows ends the process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from specplug.constraints.schema_errors import error_at
from specplug.constraints.schema_walk import Node, children, reachable, referred

MAX_CHAIN = 500
"""Schemas; 1600 fit into a stack of 8 MB."""


def check_depth(root: Node) -> None:
    """Raise UsageError for a schema whose chains can be longer than MAX_CHAIN.

    Schemas that are in a cycle, or on the way from one cycle to another, count as one chain of all of them.
    """
    inner = {id(node): list(map(id, applied(root, node))) for _, node in reachable(root)}
    outer = reversed_edges(inner)
    below = _depths(inner, outer)
    above = _depths(outer, {key: links for key, links in inner.items()}, without=below)
    between = len(inner) - len(below) - len(above)
    if max(below.values(), default=0) + max(above.values(), default=0) + between > MAX_CHAIN:
        raise error_at("$ref", "", f"more than {MAX_CHAIN} schemas lead to each other in one chain")


def applied(root: Node, node: Node) -> list[Node]:
    """The schemas that a schema contains or refers to."""
    found = [child for _, child in children(node)]
    target = referred(root, node.get("$ref"))
    if target is not None:
        found.append(target[1])
    return [one for one in found if isinstance(one, dict)]


def reversed_edges(edges: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for start, ends in edges.items():
        for end in ends:
            found[end].append(start)
    return found


def _depths(
    inner: Mapping[int, Sequence[int]], outer: Mapping[int, Sequence[int]], without: Mapping[int, int] | None = None
) -> dict[int, int]:
    """By schema, the length of the longest chain that begins with it; of those only from which no cycle can be reached.

    without  schemas that are left out
    """
    left = without or {}
    keys = set(inner) | set(outer)
    waiting = {key: sum(one not in left for one in inner.get(key, ())) for key in keys if key not in left}
    depths: dict[int, int] = {}
    ready = [key for key, count in waiting.items() if not count]
    while ready:
        key = ready.pop()
        depths[key] = 1 + max((depths[one] for one in inner.get(key, ()) if one not in left), default=0)
        for one in outer.get(key, ()):
            if one in waiting:
                waiting[one] -= 1
                if not waiting[one]:
                    ready.append(one)
    return depths
