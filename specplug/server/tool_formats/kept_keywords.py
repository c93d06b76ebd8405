"""What of a schema a family's way of writing arguments leaves open, where it is not JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from specplug.constraints.schema_walk import escaped, reachable
from specplug.server.tool_formats.argument_types import resolved, types
from specplug.server.tool_formats.call_formats import Body, BracesCall, FieldsCall

UNIONS = ("anyOf", "oneOf", "allOf")
OF_BARE_STRINGS = ("pattern", "format", *UNIONS)
"""Keywords that are not kept for a string between tags."""

OF_BRACES = (
    *("minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "prefixItems", "minProperties"),
    *("maxProperties", "patternProperties", *UNIONS),
)
"""Keywords that are not kept for strings, lists and objects in braces."""


def left_open(body: Body, schema: dict[str, Any]) -> Iterator[str]:
    """The keywords of a function's parameters that a body does not keep, with their places."""
    if isinstance(body, BracesCall):
        for pointer, node in reachable(schema):
            if types(node, schema) & {"string", "array", "object"}:
                yield from (f"{key} at #{pointer}" for key in OF_BRACES if key in node)
    elif isinstance(body, FieldsCall):
        properties = resolved(schema, schema).get("properties")
        for name, given in properties.items() if isinstance(properties, Mapping) else ():
            one = resolved(given, schema)
            if "string" in types(one, schema):
                place = f"#/properties/{escaped(name)}"
                yield from (f"{key} at {place}" for key in OF_BARE_STRINGS if key in one)
