"""Rules for arguments in braces with bare keys, as Gemma writes them: keys sorted, strings between special quotes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specplug.server.tool_formats.argument_types import Schema, resolved, types
from specplug.server.tool_formats.lark_rules import Rules

MAX_DEPTH = 8
"""Objects and lists within each other that are constrained by their schemas; deeper ones may hold any values."""

ANY = "braces_any"


def braces_rules(rules: Rules, prefix: str, quote: str, schema: Schema) -> str:
    """A rule for the arguments of a function, in braces; its name begins with `prefix`."""
    if ANY not in rules:
        text = _string(rules, quote)
        rules.add("braces_key", r"/[^\s:{},\[\]<>\"|]+/")
        pair = f'braces_key ":" {ANY}'
        rules.add("braces_object", f'"{{" ({pair} ("," {pair})*)? "}}"')
        rules.add("braces_list", f'"[" ({ANY} ("," {ANY})*)? "]"')
        rules.add("braces_number", r"/-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?/")
        rules.add("braces_constant", '"true" | "false" | "null"')
        rules.add(ANY, f"{text} | braces_object | braces_list | braces_number | braces_constant")
    return rules.add(prefix, _object(rules, prefix, quote, resolved(schema, schema), schema, 0))


def _object(rules: Rules, prefix: str, quote: str, schema: Schema, root: Schema, depth: int) -> str:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping):
        return "braces_object"
    if not isinstance(required, list):
        required = []
    # A comma stands between two pairs, whichever of them are there: what follows a pair begins with one.
    first: list[str] = []
    follow = ""
    for index, key in reversed(list(enumerate(sorted(properties)))):
        value = _value(rules, f"{prefix}_{index}", quote, properties[key], root, depth + 1)
        pair = f"{rules.literal(f'{key}:')} {value}"
        here = rules.add(f"{prefix}_from_{index}", f"{pair} {follow}")
        if key in required:
            first, follow = [here], f'"," {here}'
        else:
            first = [here, *first]
            follow = rules.add(f"{prefix}_after_{index}", f'("," {here}) | ({follow})') if follow else f'("," {here})?'
    if not first:
        return '"{" "}"'
    inside = f"({' | '.join(first)})"
    return f'"{{" {inside}{"" if set(required) & set(properties) else "?"} "}}"'


def _value(rules: Rules, prefix: str, quote: str, given: Any, root: Schema, depth: int) -> str:
    schema, allowed = resolved(given, root), types(given, root)
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
        return f"({' | '.join(rules.literal(f'{quote}{choice}{quote}') for choice in choices)})"
    if depth > MAX_DEPTH or len(allowed) != 1:
        return ANY
    (kind,) = allowed
    if kind == "object":
        return rules.add(f"{prefix}_object", _object(rules, prefix, quote, schema, root, depth))
    if kind == "array":
        item = _value(rules, f"{prefix}_item", quote, schema.get("items", {}), root, depth + 1)
        return rules.add(f"{prefix}_list", f'"[" ({item} ("," {item})*)? "]"')
    if kind == "string":
        return _string(rules, quote)
    return rules.add(f"{prefix}_json", rules.json({**schema, "x-guidance": root.get("x-guidance", {})}))


def _string(rules: Rules, quote: str) -> str:
    if "braces_string" not in rules:
        mark = rules.literal(quote)
        if mark.startswith("<["):
            rules.terminal("BRACES_TEXT", r"/(?s:.*)/")
            rules.add("braces_string", f"{mark} BRACES_TEXT {mark}")
        else:
            end = rules.lazy("braces_end", f"/(?s:.*)/ {mark}")
            rules.add("braces_string", f"{mark} {end}")
    return "braces_string"
