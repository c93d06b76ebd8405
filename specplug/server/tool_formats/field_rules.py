"""Rules for arguments that stand one by one between tags, in the order of the schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from specplug.server.tool_formats.argument_types import Schema, argument, choices, document, resolved, types
from specplug.server.tool_formats.call_formats import FieldsCall
from specplug.server.tool_formats.lark_rules import Rules


def field_rules(rules: Rules, prefix: str, body: FieldsCall, schema: Schema) -> str:
    """A rule for all arguments of a function, without the text after the last one; its name begins with `prefix`."""
    root = resolved(schema, schema)
    properties = root.get("properties")
    required = root.get("required")
    if not isinstance(properties, Mapping) or not properties:
        if root.get("additionalProperties") is False or properties == {}:
            return ""
        rules.add(f"{prefix}_key", r"/[^<>\n]+/")
        value = _raw(rules, f"{prefix}_value", body, "")
        return rules.add(prefix, f"({rules.literal(body.key)} {prefix}_key {rules.literal(body.value)} {value})*")
    parts = []
    for index, (key, given) in enumerate(properties.items()):
        if given is False:
            continue
        value = _value(rules, f"{prefix}_{index}", body, given, schema)
        field = f"{rules.literal(f'{body.key}{key}{body.value}')} {value}"
        parts.append(field if isinstance(required, list) and key in required else f"({field})?")
    return rules.add(prefix, " ".join(parts))


def _value(rules: Rules, name: str, body: FieldsCall, given: Any, root: Schema) -> str:
    """One value, and the text after it."""
    schema, allowed = resolved(given, root), types(given, root)
    if "string" not in allowed:
        return f"{rules.add(f'{name}_json', rules.json(document(given, root)))} {rules.literal(body.end)}"
    listed = bare_choices(schema, allowed)
    if listed:
        options = " | ".join(rules.literal(choice) or '""' for choice in listed)
        return f"({options}) {rules.literal(body.end)}"
    return _raw(rules, name, body, length(schema) if allowed == {"string"} else "")


def bare_choices(schema: Schema, allowed: frozenset[str]) -> list[str]:
    """The texts of the values that a schema lists; empty where it lists none, or one that would be read as another."""
    texts = []
    for choice in choices(schema, allowed):
        texts.append(choice if isinstance(choice, str) else json.dumps(choice, ensure_ascii=False))
        if json.dumps(json.loads(argument(texts[-1], allowed))) != json.dumps(choice):
            return []
    return texts


def length(schema: Schema) -> str:
    """How often a string's characters may occur, as a regular expression has it; empty where that is not limited."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    return f"{{{least},{most}}}" if least or most != "" else ""


def _raw(rules: Rules, name: str, body: FieldsCall, count: str) -> str:
    """Any text up to the end of a value, that too. `count` bounds its number of characters."""
    end = rules.literal(body.end)
    if "<[" in end:
        rules.add(f"{name}_text", f"/(?s:.){count or '*'}/")
        return f"{name}_text {rules.literal(body.end.lstrip())}"
    return rules.lazy(name, f"/(?s:.){count or '*'}/ {end}")
