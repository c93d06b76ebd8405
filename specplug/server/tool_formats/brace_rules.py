"""Rules for arguments in braces with bare keys, as Gemma writes them: keys sorted, strings between special quotes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from specplug.server.tool_formats.argument_types import STRUCTURED, Schema, choices, direct, document, resolved, types
from specplug.server.tool_formats.lark_rules import Rules

OF_NUMBERS = frozenset({"multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
"""Keywords about numbers."""

ANY, ANY_OBJECT, STRING = "braces_any", "braces_object", "braces_string"


def brace_rules(rules: Rules, prefix: str, quote: str, schema: Schema) -> str:
    """A rule for the arguments of a function, in braces; its name begins with `prefix`."""
    if ANY not in rules:
        _add_any(rules, rules.literal(quote))
    return _Braces(rules, prefix, quote, schema).object(resolved(schema, schema))


class _Braces:
    """The rules of one function, of which each part of its schema gets one."""

    def __init__(self, rules: Rules, prefix: str, quote: str, root: Schema) -> None:
        self._rules = rules
        self._prefix = prefix
        self._quote = quote
        self._root = root
        self._names: dict[tuple[int, str], str] = {}

    def object(self, schema: Schema) -> str:
        properties = schema.get("properties", {} if schema.get("additionalProperties") is False else None)
        if not isinstance(properties, Mapping):
            return ANY_OBJECT
        properties = {key: given for key, given in properties.items() if given is not False}
        name, is_new = self._name(schema, "object")
        if not is_new:
            return name
        given = schema.get("required")
        required = set(given) & set(properties) if isinstance(given, list) else set()
        # A comma stands between two pairs, whichever of them are there: `follow` is what may come after a pair.
        first: list[str] = []
        follow = ""
        for index, key in reversed(list(enumerate(sorted(properties)))):
            pair = f"{self._rules.literal(f'{key}:')} {self._value(properties[key])}"
            here = self._rules.add(f"{name}_from_{index}", f"{pair} {follow}")
            if key in required:
                first, follow = [here], f'"," {here}'
            else:
                first = [here, *first]
                after = f'("," {here}) | ({follow})' if follow else f'("," {here})?'
                follow = self._rules.add(f"{name}_after_{index}", after)
        pairs = f"({' | '.join(first)}){'' if required else '?'}" if first else ""
        return self._rules.add(name, f'"{{" {pairs} "}}"')

    def _value(self, given: Any) -> str:
        rules, schema, allowed = self._rules, resolved(given, self._root), types(given, self._root)
        if not allowed & STRUCTURED:
            part = direct(given, self._root)
            return self._json(part, part)
        listed = choices(schema, allowed)
        if listed:
            return f"({' | '.join(rules.literal(_written(choice, self._quote)) for choice in listed)})"
        if "type" not in schema:
            return ANY
        options = [STRING] if "string" in allowed else []
        if "object" in allowed:
            options.append(self.object(schema))
        if "array" in allowed:
            options.append(self._array(schema))
        if scalars := sorted(allowed - STRUCTURED):
            limits = {key: schema[key] for key in OF_NUMBERS if key in schema}
            options.append(self._json(schema, {"type": scalars, **limits}))
        return f"({' | '.join(options)})"

    def _array(self, schema: Schema) -> str:
        name, is_new = self._name(schema, "array")
        if is_new:
            item = self._value(schema.get("items", {}))
            self._rules.add(name, f'"[" ({item} ("," {item})*)? "]"')
        return name

    def _json(self, schema: Schema, part: Schema) -> str:
        """A rule for the values of a part of `schema`, or of it, that are written as JSON."""
        name, is_new = self._name(schema, "json")
        return self._rules.add(name, self._rules.json(document(part, self._root))) if is_new else name

    def _name(self, schema: Schema, kind: str) -> tuple[str, bool]:
        """The name of the rule for the values of a schema that have a kind, and whether there is no such rule yet."""
        is_new = (id(schema), kind) not in self._names
        return self._names.setdefault((id(schema), kind), f"{self._prefix}_{len(self._names)}"), is_new


def _written(value: Any, quote: str) -> str:
    """A value as it stands in braces."""
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, list):
        return f"[{','.join(_written(one, quote) for one in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(value[key], quote)}' for key in sorted(value))}}}"
    return json.dumps(value)


def _add_any(rules: Rules, quote: str) -> None:
    """Rules for values without a schema, and for strings between quotes, which may be control tokens."""
    if quote.startswith("<["):
        rules.add("BRACES_TEXT", r"/(?s:.*)/")
        rules.add(STRING, f"{quote} BRACES_TEXT {quote}")
    else:
        rules.add(STRING, f"{quote} {rules.lazy('braces_end', f'/(?s:.*)/ {quote}')}")
    pair = f'braces_key ":" {ANY}'
    rules.add("braces_key", r"/[^\s:{},\[\]<>\"|]+/")
    rules.add(ANY_OBJECT, f'"{{" ({pair} ("," {pair})*)? "}}"')
    rules.add("braces_list", f'"[" ({ANY} ("," {ANY})*)? "]"')
    rules.add("braces_number", r"/-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?/")
    rules.add("braces_constant", '"true" | "false" | "null"')
    rules.add(ANY, f"{STRING} | {ANY_OBJECT} | braces_list | braces_number | braces_constant")
