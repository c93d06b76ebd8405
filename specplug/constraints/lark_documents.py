"""The JSON schemas within a Lark grammar that somebody wrote, prepared as every other schema is.

llguidance compiles a `%json` as it stands: without the checks of numbers and depth that keep the process alive.
"""

from __future__ import annotations

import json
import re

from specplug.constraints.grammar_text import MAX_BYTES, json_document
from specplug.errors import UsageError

_DOCUMENT = re.compile(r"%json\s*")


def prepared_lark(text: str) -> str:
    """The grammar with all its schemas prepared. Raises UsageError for one of which not all can be enforced."""
    if len(text) > MAX_BYTES["Lark grammar"]:  # it is refused for its size, by whoever opens it
        return text
    decoder = json.JSONDecoder()
    parts, done = [], 0
    for found in _DOCUMENT.finditer(text):
        if found.start() < done:  # within a schema
            continue
        try:
            schema, end = decoder.raw_decode(text, found.end())
        except (ValueError, RecursionError):  # llguidance says what is wrong
            continue
        if isinstance(schema, dict):
            schema.pop("x-guidance", None)  # options are the server's
        try:
            document, _ = json_document(json.dumps(schema), strict=True)
        except UsageError as error:
            raise UsageError(f"the Lark grammar: {error}") from None
        parts += [text[done : found.end()], document]
        done = end
    return "".join([*parts, text[done:]])
