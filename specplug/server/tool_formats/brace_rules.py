"""Rules for arguments in braces with bare keys, as Gemma writes them: keys sorted, strings between special quotes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specplug.server.tool_formats.argument_types import Schema, document, resolved, types
from specplug.server.tool_formats.lark_rules import Rules

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
        self._names: dict[int, str] = {}

    def object(self, schema: Schema) -> str:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping):
            return ANY_OBJECT
        if id(schema) in self._names:
            return self._names[id(schema)]
        name = self._names[id(schema)] = f"{self._prefix}_{len(self._names)}"
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
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            return f"({' | '.join(rules.literal(f'{self._quote}{choice}{self._quote}') for choice in choices)})"
        if len(allowed) != 1:
            return ANY
        (kind,) = allowed
        if kind == "string":
            return STRING
        if kind == "object":
            return self.object(schema)
        if id(schema) in self._names:
            return self._names[id(schema)]
        name = self._names[id(schema)] = f"{self._prefix}_{len(self._names)}"
        if kind == "array":
            item = self._value(schema.get("items", {}))
            return rules.add(name, f'"[" ({item} ("," {item})*)? "]"')
        return rules.add(name, rules.json(document(schema, self._root)))


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
