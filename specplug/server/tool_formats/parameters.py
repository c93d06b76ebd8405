"""A function's parameters as a JSON schema that can be compiled, checked before a prompt is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

from specplug.constraints.grammar_text import json_document
from specplug.constraints.schema_walk import everywhere
from specplug.errors import UsageError
from specplug.server.tool_formats.argument_types import Schema
from specplug.server.tool_formats.call_formats import Body
from specplug.server.tool_formats.kept_keywords import left_open


class Function(Protocol):
    """A function as a request describes it."""

    name: str
    parameters: dict[str, Any]
    strict: bool | None


@dataclass(frozen=True, slots=True)
class Parameters:
    """The schema of a function's arguments, with llguidance's options in it, and what of it is not enforced."""

    schema: Schema
    warnings: tuple[str, ...] = ()


def prepare(function: Function, body: Body, *, required: bool) -> Parameters:
    """The parameters of a function as an object's schema, with llguidance's options in it.

    body      how the model writes arguments
    required  the answer must call; else references to other documents are left out with a warning, as nothing can
              rely on them, unless the function is strict
    Raises UsageError, with the function's name, for what is no schema, beyond the limits, or strict and not enforced.
    """
    place, warnings = f"tools: {function.name}: ", list[str]()
    if function.parameters.get("type", "object") != "object":
        raise UsageError(f'{place}JSON schema: type at #: arguments are an object; write "object"')
    text = json.dumps({"type": "object", **function.parameters})
    if not required and not function.strict:
        text, warnings = _without_foreign_references(text)
    try:
        document, ignored = json_document(text, strict=bool(function.strict))
    except UsageError as error:
        raise UsageError(f"{place}{error}") from error
    schema = json.loads(document)
    for keyword in left_open(body, schema):
        if any(line.startswith(f"{keyword} is not enforced") for line in ignored):
            continue
        if function.strict:
            raise UsageError(f"{place}{keyword} cannot be enforced as this model writes calls; leave out strict")
        warnings.append(f"{keyword} is not enforced as this model writes calls")
    return Parameters(schema, tuple(f"{place}{warning}" for warning in (*warnings, *ignored)))


def _without_foreign_references(text: str) -> tuple[str, list[str]]:
    root = json.loads(text)
    warnings = []
    for node in everywhere(root):
        reference = node.get("$ref")
        if isinstance(reference, str) and "://" in reference and not _is_named(root):
            del node["$ref"]
            warnings.append(f"$ref to {reference[:100]} is not enforced: it is another document")
    return json.dumps(root) if warnings else text, warnings


def _is_named(root: dict[str, Any]) -> bool:
    """Whether a part of the document has a name that a reference may use in place of its address."""
    return any(isinstance(node.get(key), str) for node in everywhere(root) for key in ("$id", "id"))
