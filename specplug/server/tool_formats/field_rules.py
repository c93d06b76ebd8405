"""Rules for arguments that stand one by one between tags, in the order of the schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specplug.server.tool_formats.argument_types import Schema, document, resolved, types
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
        value = _value(rules, f"{prefix}_{index}", body, given, schema)
        field = f"{rules.literal(f'{body.key}{key}{body.value}')} {value}"
        parts.append(field if isinstance(required, list) and key in required else f"({field})?")
    return rules.add(prefix, " ".join(parts))


def _value(rules: Rules, name: str, body: FieldsCall, given: Any, root: Schema) -> str:
    """One value, and the text after it."""
    schema, allowed = resolved(given, root), types(given, root)
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
        options = " | ".join(rules.literal(choice) or '""' for choice in choices)
        return f"({options}) {rules.literal(body.end)}"
    if allowed == {"string"}:
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        bounded = isinstance(least, int) and isinstance(most, int | str) and (least or most != "")
        return _raw(rules, name, body, f"{{{least},{most}}}" if bounded else "")
    if "string" in allowed:
        return _raw(rules, name, body, "")
    return f"{rules.add(f'{name}_json', rules.json(document(given, root)))} {rules.literal(body.end)}"


def _raw(rules: Rules, name: str, body: FieldsCall, count: str) -> str:
    """Any text up to the end of a value, that too. `count` bounds its number of characters."""
    end = rules.literal(body.end)
    if "<[" in end:
        rules.add(f"{name}_text", f"/(?s:.){count or '*'}/")
        return f"{name}_text {rules.literal(body.end.lstrip())}"
    return rules.lazy(name, f"/(?s:.){count or '*'}/ {end}")
