"""Reads the bodies of tool calls: a name, and arguments as JSON text, in each of the ways in which models write them.

Knows no openings, and not what stands between two calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from specplug.server.tool_formats.argument_types import Schema, argument, resolved, types
from specplug.server.tool_formats.call_formats import BracesCall, FieldsCall, HeadedCall
from specplug.server.tool_formats.json_text import Emit, as_json, quoted, string, value, without_surrogates
from specplug.server.tool_formats.partial_text import PartialText, Read

MAX_HEADER = 400
"""Characters of the longest header between a call's opening and its arguments."""

KEYS = {"name", "arguments", "parameters", "type", "id", "function"}
"""The keys of a call."""

NAME_PART = re.compile(r"[a-zA-Z0-9_.-]*")


class NoCall(Exception):
    """What began like a call is none."""


class CallBodies:
    """Reads one call at a time. Every method raises NoCall or NotJson where there is none."""

    def __init__(
        self,
        source: PartialText,
        tools: Mapping[str, Schema],
        begin: Callable[[str, str], None],
        pass_on: Emit,
    ) -> None:
        """
        tools    the JSON schema of the arguments, by the function's name
        begin    called with the name and the id of a call, which is "" if the model gives it none
        pass_on  receives the arguments, piece by piece
        """
        self._source = source
        self._tools = tools
        self._begin = begin
        self._pass_on = pass_on

    def read(self, body: HeadedCall | FieldsCall | BracesCall) -> Read[None]:
        """One call after its opening."""
        source = self._source
        yield from source.space()
        if isinstance(body, HeadedCall):
            yield from self._headed(body)
            return
        is_passed = source.text[: source.at].endswith(body.before)  # it may be the trigger
        if not is_passed and not (yield from source.literal(body.before)):
            raise NoCall
        name = yield from source.run(NAME_PART)
        if name not in self._tools:
            raise NoCall
        if isinstance(body, FieldsCall):
            yield from self._fields(body, name)
        else:
            yield from self.arguments(name, quote=body.quote)

    def object(self, *, only_calls: bool) -> Read[None]:
        """An object with a name and arguments, in any order.

        only_calls  an object with a key that calls do not have is none
        """
        source, name, kept = self._source, "", list[str]()
        has_arguments = False
        if not (yield from source.literal("{")):
            raise NoCall
        while True:
            parts: list[str] = []
            yield from source.space()
            yield from string(source, parts.append)
            key = _unquoted(parts)
            yield from source.space()
            if (only_calls and key not in KEYS) or not (yield from source.literal(":")):
                raise NoCall
            yield from source.space()
            if key == "name" and not name:
                parts = []
                yield from string(source, parts.append)
                name = _unquoted(parts)
                if name not in self._tools:
                    raise NoCall
            elif key in ("arguments", "parameters") and not has_arguments:
                has_arguments = True
                if name:
                    yield from self.arguments(name)
                else:
                    yield from self._value(kept.append)
            else:
                yield from value(source, lambda text: None)
            yield from source.space()
            if (yield from source.literal("}")):
                break
            if not (yield from source.literal(",")):
                raise NoCall
        if not name:
            raise NoCall
        if kept or not has_arguments:
            self._begin(name, "")
            self._pass_on("".join(kept) or "{}")

    def _headed(self, body: HeadedCall) -> Read[None]:
        header = ""

        def keep(piece: str) -> None:
            nonlocal header
            header += piece
            if len(header) > MAX_HEADER:
                raise NoCall

        if not (yield from self._source.until([body.divider], keep)):
            raise NoCall
        found = body.header.fullmatch(header.strip())
        if found is None or found["name"] not in self._tools:
            raise NoCall
        yield from self.arguments(found["name"], found["id"] or "")

    def arguments(self, name: str, call_id: str = "", quote: str = "") -> Read[None]:
        """The value of the arguments, which is passed on while it arrives if it is an object."""
        source = self._source
        yield from source.space()
        if (yield from source.peek()) == "{":
            self._begin(name, call_id)
            yield from value(source, self._pass_on, quote)
        else:
            kept: list[str] = []
            yield from self._value(kept.append)
            self._begin(name, call_id)
            self._pass_on("".join(kept))

    def _value(self, emit: Emit) -> Read[None]:
        """Arguments as one text: an object, null, or a string that holds an object."""
        parts: list[str] = []
        yield from value(self._source, parts.append)
        read = "".join(parts)
        if read == "null":
            read = "{}"
        elif read.startswith('"'):
            read = as_json(without_surrogates(_unquoted(parts))) or ""
        if not read.lstrip().startswith("{"):
            raise NoCall
        emit(read)

    def _fields(self, body: FieldsCall, name: str) -> Read[None]:
        source, root = self._source, self._tools[name]
        properties = resolved(root, root).get("properties")
        yield from source.space()
        if body.after.strip() and not (yield from source.literal(body.after.strip())):
            raise NoCall
        yield from source.space()
        before = "{"
        while (yield from source.literal(body.key)):
            if before == "{":
                self._begin(name, "")
            key: list[str] = []
            dividers = body.value.split()
            if not (yield from source.until(dividers[:1], key.append)):
                raise NoCall
            for divider in dividers[1:]:
                yield from source.space()
                if not (yield from source.literal(divider)):
                    raise NoCall
            if body.value.endswith("\n"):
                yield from source.literal("\n")
            self._pass_on(f"{before}{quoted(''.join(key))}: ")
            schema = properties.get("".join(key), {}) if isinstance(properties, Mapping) else {}
            yield from self._field(body.end, types(schema, root))
            before = ", "
            yield from source.space()
        if before == "{":
            self._begin(name, "")
            self._pass_on("{")
        if body.closing and not (yield from source.literal(body.closing.strip())):
            raise NoCall
        self._pass_on("}")

    def _field(self, end: str, allowed: frozenset[str]) -> Read[None]:
        """One argument of a type of `allowed`; a string is passed on while it arrives."""
        ends = [f"\n{end.strip()}", end.strip()] if end.startswith("\n") else [end.strip()]
        if allowed == {"string"}:
            self._pass_on('"')
            if not (yield from self._source.until(ends, lambda piece: self._pass_on(quoted(piece)[1:-1]))):
                raise NoCall
            self._pass_on('"')
            return
        parts: list[str] = []
        if not (yield from self._source.until(ends, parts.append)):
            raise NoCall
        self._pass_on(argument("".join(parts), allowed))


def _unquoted(parts: list[str]) -> str:
    return str(json.loads("".join(parts)))
