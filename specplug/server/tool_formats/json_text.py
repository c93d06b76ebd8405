"""JSON values in a text that arrives in pieces: passed on as text, without a number or an escape being interpreted.

What models write beside JSON is made JSON: control characters in strings are escaped, and NaN and infinities become
strings. Strings between other quotes and bare keys are read too, where a family of models writes these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from specplug.server.tool_formats.partial_text import PartialText, Read

Emit = Callable[[str], None]

PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
WORD = re.compile(r"[-+.0-9A-Za-z]*")
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
ESCAPE = re.compile(r'["\\/bfnrt]|u[0-9a-fA-F]{4}')
HEX = re.compile(r"[0-9a-fA-F]*")
CONSTANTS = {"true", "false", "null"}
NOT_JSON = {"NaN", "Infinity", "-Infinity"}
CLOSERS = {"{": "}", "[": "]"}


class NotJson(Exception):
    """The text is no JSON, or ends within it."""


def value(source: PartialText, emit: Emit, quote: str = "") -> Read[None]:
    """Pass one JSON value and emit its text. Raises NotJson.

    quote  stands on both sides of a string in place of `"`; then keys may be bare
    """
    closers: list[str] = []
    expected = (
        "value"  # or "key", "member" (a key or the end), "item" (a value or the end), "next" (a comma or the end)
    )
    while True:
        emit((yield from source.space()))
        char = yield from source.peek()
        if closers and char == closers[-1] and expected in ("member", "item", "next"):
            source.at += 1
            emit(char)
            closers.pop()
            expected = "next"
        elif expected == "next":
            if char != ",":
                raise NotJson
            source.at += 1
            emit(",")
            expected = "key" if closers[-1] == "}" else "value"
            continue
        elif expected in ("member", "key"):
            yield from _key(source, emit, quote)
            expected = "value"
            continue
        elif char in CLOSERS:
            source.at += 1
            emit(char)
            closers.append(CLOSERS[char])
            expected = "member" if char == "{" else "item"
            continue
        else:
            yield from _scalar(source, emit, quote)
            expected = "next"
        if not closers:
            return


def string(source: PartialText, emit: Emit) -> Read[None]:
    """Pass a string in double quotes and emit it with its quotes. Raises NotJson."""
    if not (yield from source.literal('"')):
        raise NotJson
    emit('"')
    while True:
        yield from source.run(PLAIN, emit)
        char = yield from source.peek()
        source.at += 1
        if char == '"':
            emit('"')
            return
        if char == "\\":
            letter = yield from source.peek()
            source.at += 1
            digits = ""
            while letter == "u" and len(digits) < 4 and HEX.fullmatch((yield from source.peek()) or "x"):
                digits += source.text[source.at]
                source.at += 1
            if not ESCAPE.fullmatch(letter + digits):
                raise NotJson
            emit(f"\\{letter}{digits}")
        elif char:
            emit(json.dumps(char)[1:-1])
        else:
            raise NotJson


def as_json(text: str) -> str | None:
    """The text as JSON, if it is one value and no more."""
    source, parts = PartialText(text, ended=True), list[str]()
    try:
        for _ in value(source, parts.append):
            pass
    except NotJson:
        return None
    return None if source.text[source.at :].strip() else "".join(parts).strip()


def quoted(text: str) -> str:
    """A text as a JSON string; half surrogates, which UTF-8 cannot hold, become escapes."""
    escaped = json.dumps(text, ensure_ascii=False)
    return without_surrogates(escaped)


def without_surrogates(text: str) -> str:
    """The text with its half surrogates written as JSON's escapes."""
    return re.sub(r"[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _key(source: PartialText, emit: Emit, quote: str) -> Read[None]:
    if not quote or (yield from source.peek()) == '"':
        yield from string(source, emit)
    elif not (yield from _between_quotes(source, emit, quote)):
        parts: list[str] = []
        if not (yield from source.until([":"], parts.append)):
            raise NotJson
        source.at -= 1
        emit(quoted("".join(parts).strip()))
    emit((yield from source.space()))
    if not (yield from source.literal(":")):
        raise NotJson
    emit(":")


def _scalar(source: PartialText, emit: Emit, quote: str) -> Read[None]:
    if quote and (yield from _between_quotes(source, emit, quote)):
        return
    if (yield from source.peek()) == '"':
        yield from string(source, emit)
        return
    word = yield from source.run(WORD)
    if word in NOT_JSON:
        emit(f'"{word}"')
    elif word in CONSTANTS or NUMBER.fullmatch(word):
        emit(word)
    else:
        raise NotJson


def _between_quotes(source: PartialText, emit: Emit, quote: str) -> Read[bool]:
    """Pass a string between other quotes, if one comes next."""
    if not (yield from source.literal(quote)):
        return False
    emit('"')
    if not (yield from source.until([quote], lambda piece: emit(quoted(piece)[1:-1]))):
        raise NotJson
    emit('"')
    return True
