"""A function's parameters as a schema that llguidance compiles, checked before a prompt is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

from specplug.errors import UsageError
from specplug.server.tool_formats.argument_types import Schema
from specplug.server.tool_formats.lark import SPACING


class Function(Protocol):
    """A function as a request describes it."""

    name: str
    parameters: dict[str, Any]
    strict: bool | None


@dataclass(frozen=True, slots=True)
class Parameters:
    """The schema of a function's arguments, and what of it is not enforced, one line each."""

    schema: Schema
    warnings: tuple[str, ...] = ()


def prepare(function: Function) -> Parameters:
    """Raises UsageError, with the function's name, for parameters that are no schema, or not enforced though strict."""
    from llguidance import LLMatcher, LLParserLimits

    options = {**SPACING, "lenient": not function.strict}
    schema = {"type": "object", **function.parameters, "x-guidance": options}
    grammar = LLMatcher.grammar_from_lark(f"start: %json {json.dumps(schema)}\n")
    failed, lines = LLMatcher.validate_grammar_with_warnings(grammar, limits=LLParserLimits(verbose_errors=False))
    if failed:
        reason = lines[0].partition("failed to compile JSON schema: ")[2] or lines[0]
        raise UsageError(f"tools: the parameters of {function.name}: {reason.partition(chr(10))[0]}")
    return Parameters(schema, tuple(f"tools: {function.name}: {line}" for line in lines))
