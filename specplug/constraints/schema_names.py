"""Writes the references of a JSON schema as JSON pointers from its root, in place of names that the schema gives.

Names are `$anchor`, and `$id` (`id` in draft 4) with the addresses that follow from it. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote, urldefrag, urljoin

from specplug.constraints.schema_walk import DEFINITIONS, Node, children, escaped, everywhere

_DRAFT_4 = "draft-04"
_ALONE = ("draft-04", "draft-06", "draft-07")
"""In these drafts names beside `$ref` have no effect."""


def point_references(root: Node) -> None:
    """Replace references by name in place, and remove `$id`. References to other documents stay as they are."""
    key = "id" if _DRAFT_4 in str(root.get("$schema")) else "$id"
    if any(draft in str(root.get("$schema")) for draft in _ALONE):
        for node in everywhere(root):
            if "$ref" in node:
                node.pop(key, None)
    documents = {"": ""}
    anchors: dict[tuple[str, str], str] = {}
    uses: list[tuple[Node, str]] = []
    for pointer, node, base in _with_bases(root, key):
        if not pointer or _names_document(node.get(key)):
            documents[base] = pointer
        for name in (node.get("$anchor"), node.get(key)):
            if isinstance(name, str) and (name.startswith("#") or name is node.get("$anchor")):
                anchors[base, name.removeprefix("#")] = pointer
        if isinstance(node.get("$ref"), str):
            uses.append((node, base))
    for node, base in uses:
        document, fragment = _resolved(base, node["$ref"])
        start = documents.get(document)
        if start is not None and (not fragment or fragment.startswith("/")):
            node["$ref"] = f"#{quote(start, safe='/~')}{fragment}"
        elif (document, fragment) in anchors:
            node["$ref"] = f"#{quote(anchors[document, fragment], safe='/~')}"
    for _, node, _ in list(_with_bases(root, key)):
        for name in (key, "$anchor"):
            if isinstance(node.get(name), str):
                del node[name]


def _with_bases(root: Node, key: str) -> Iterator[tuple[str, Node, str]]:
    """All schemas, each with its JSON pointer and the address from which its references start."""
    waiting: list[tuple[str, object, str]] = [("", root, "")]
    while waiting:
        pointer, node, base = waiting.pop()
        if not isinstance(node, dict):
            continue
        if _names_document(node.get(key)):
            base = _resolved(base, node[key])[0]
        yield pointer, node, base
        waiting += [(pointer + below, child, base) for below, child in children(node)]
        for name in DEFINITIONS:
            if isinstance(node.get(name), dict):
                waiting += [(f"{pointer}/{name}/{escaped(inner)}", one, base) for inner, one in node[name].items()]


def _names_document(name: object) -> bool:
    return isinstance(name, str) and not name.startswith("#")


def _resolved(base: str, reference: str) -> tuple[str, str]:
    """The address that a reference leads to, without and with what follows `#`."""
    if reference.startswith("#"):
        return base, reference[1:]
    try:
        document, fragment = urldefrag(urljoin(base, reference))
    except ValueError:  # no address
        return reference, ""
    return document, fragment
