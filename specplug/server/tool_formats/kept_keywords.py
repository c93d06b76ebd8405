"""What of a schema a family's way of writing arguments leaves open, where it is not JSON.

It lists what `field_rules.py` and `brace_rules.py` keep of each schema, and yields every other keyword that can make a
value invalid. What these write as JSON is kept completely.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from specplug.constraints.schema_walk import DEFINITIONS, KEYWORDS, escaped
from specplug.server.tool_formats.argument_types import ALL, STRUCTURED, Schema, chain, choices, types
from specplug.server.tool_formats.brace_rules import OF_NUMBERS
from specplug.server.tool_formats.call_formats import Body, BracesCall, FieldsCall
from specplug.server.tool_formats.field_rules import bare_choices, length

NAMING = {"$ref", "$schema", "$id", "id", "$anchor", "$dynamicAnchor", *DEFINITIONS}
"""Keywords that forbid no value by themselves."""

OF_STRINGS = ("minLength", "maxLength", "pattern", "format")
OF_ARRAYS = (
    *("items", "additionalItems", "unevaluatedItems", "prefixItems", "contains", "minContains", "maxContains"),
    *("minItems", "maxItems", "uniqueItems"),
)
OF_OBJECTS = (
    *("properties", "patternProperties", "required", "propertyNames", "additionalProperties", "unevaluatedProperties"),
    *("dependencies", "dependentSchemas", "dependentRequired", "minProperties", "maxProperties"),
)
TYPES = {
    **dict.fromkeys(OF_NUMBERS, frozenset({"number", "integer"})),
    **dict.fromkeys(OF_STRINGS, frozenset({"string"})),
    **dict.fromkeys(OF_ARRAYS, frozenset({"array"})),
    **dict.fromkeys(OF_OBJECTS, frozenset({"object"})),
}
"""The types that a keyword is about; those that are missing are about all."""

IDLE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("items", "additionalItems", "unevaluatedItems"), (True, {})),
    **dict.fromkeys(("additionalProperties", "unevaluatedProperties"), (True, {})),
    **dict.fromkeys(("minLength", "minItems", "minProperties"), (0,)),
    **dict.fromkeys(("required", "prefixItems"), ([],)),
    "patternProperties": ({},),
}
"""Values of keywords that forbid nothing."""


def left_open(body: Body, schema: Schema) -> Iterator[str]:
    """The keywords of a function's parameters that a body does not keep, with their places."""
    if isinstance(body, BracesCall):
        yield from _Braces(schema).node(schema, "", is_root=True)
    elif isinstance(body, FieldsCall):
        yield from _fields(schema)


def _fields(root: Schema) -> Iterator[str]:
    *before, (pointer, node) = chain(root, root)
    yield from _beside(before, "", kept={"type"})
    yield from _dropped(node, pointer, {"object"}, {"type", *_kept_of_object(node)})
    properties = node.get("properties")
    for name, given in properties.items() if isinstance(properties, Mapping) else ():
        allowed = types(given, root)
        if "string" not in allowed or given is False:
            continue
        place = f"{pointer}/properties/{escaped(name)}"
        *before, (inner, one) = chain(given, root)
        yield from _beside(before, place)
        kept = {"type"}
        if bare_choices(one, allowed):
            kept.add("const" if "const" in one else "enum")
        elif allowed == {"string"} and length(one):
            kept |= {"minLength", "maxLength"}
        yield from _dropped(one, inner or place, allowed, kept)


class _Braces:
    """Visits each part of a schema once."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._seen: set[int] = set()

    def node(self, given: Any, place: str, *, is_root: bool = False) -> Iterator[str]:
        allowed = frozenset({"object"}) if is_root else types(given, self._root)
        if not allowed & STRUCTURED:
            return
        *before, (pointer, node) = chain(given, self._root)
        yield from _beside(before, place, kept={"type"} if is_root else ())
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        place = pointer or place
        if choices(node, allowed) and not is_root:
            yield from _dropped(node, place, allowed, {"type", "const" if "const" in node else "enum"})
        elif "type" not in node and not is_root:
            yield from _dropped(node, place, allowed, ())
        else:
            items, properties = node.get("items"), node.get("properties")
            kept = {"type", *OF_NUMBERS, *_kept_of_object(node)}
            yield from _dropped(node, place, allowed, kept | ({"items"} if isinstance(items, Mapping) else set()))
            if "array" in allowed and isinstance(items, Mapping):
                yield from self.node(items, f"{place}/items")
            for name, inner in properties.items() if "object" in allowed and isinstance(properties, Mapping) else ():
                yield from self.node(inner, f"{place}/properties/{escaped(name)}")


def _kept_of_object(node: Schema) -> Iterator[str]:
    """The keywords about an object that are kept where its properties are written as listed, and no others."""
    properties, required = node.get("properties"), node.get("required", ())
    named = properties if isinstance(properties, Mapping) else {}
    yield "properties"
    if all(named.get(name, False) is not False for name in required):
        yield "required"
    if properties is not None or node.get("additionalProperties") is False:
        yield "additionalProperties"


def _beside(nodes: list[tuple[str, Schema]], place: str, kept: Collection[str] = ()) -> Iterator[str]:
    """The keywords beside references, which are not followed further."""
    for pointer, node in nodes:
        yield from _dropped(node, pointer or place, ALL, kept)


def _dropped(node: Schema, pointer: str, allowed: Collection[str], kept: Collection[str]) -> Iterator[str]:
    """The keywords that are not kept, of those that forbid a value of one of the `allowed` types."""
    for key, value in node.items():
        if key not in KEYWORDS or key in NAMING or key in kept or value in IDLE.get(key, ()):
            continue
        if not TYPES.get(key, ALL).isdisjoint(allowed):
            yield f"{key} at #{pointer}"
