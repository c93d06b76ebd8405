"""The grammar in llguidance's own form that a request's constraint means; without a tokenizer and an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from specplug.constraints.json_schema import MAX_BYTES as MAX_SCHEMA_BYTES
from specplug.constraints.json_schema import prepare
from specplug.constraints.json_spacing import Spacing
from specplug.errors import EngineError, UsageError
from specplug.generation.answers import Sampling

if TYPE_CHECKING:
    from llguidance import LLParserLimits

SPACING: Mapping[str, Any] = {"whitespace_flexible": True, "whitespace_pattern": " "}
"""Between the parts of JSON there is a space or none: models write both, and could go on with line breaks for ever."""

MAX_BYTES = {"regular expression": 64 * 1024, "Lark grammar": 1024 * 1024}
"""A Lark grammar may contain the schemas of all tools of a request."""


_SMALL_CHARS = 16 * 1024
"""Of a schema: small and large ones are kept apart, 4 MB of each."""


@dataclass(frozen=True, slots=True)
class GrammarText:
    """A grammar for llguidance.

    kind      what the request calls it, for messages
    styled    returns the grammar of those of its JSON texts that have the same spacing throughout
    warnings  what of the request is not enforced, one line each
    """

    kind: str
    text: str
    styled: Callable[[Spacing], str] | None = None
    warnings: tuple[str, ...] = ()


def limits() -> LLParserLimits:
    """What a grammar may cost.

    10,000 states of the lexer take 20 MB; 200,000 units of fuel at the start 0.2 s. An object of 1000 properties that
    may all be left out has 4000 items in a row.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_lexer_states=10_000, initial_lexer_fuel=200_000, max_items_in_row=20_000, verbose_errors=False
    )


def grammar_text(sampling: Sampling) -> GrammarText | None:
    """The grammar of a request's JSON schema, regular expression or Lark grammar; None without one of them.

    Raises UsageError with one line for one that is wrong, beyond the limits or, where strict, cannot be enforced.
    """
    if not {"json_schema", "regex", "lark"}.intersection(sampling.constraints):
        return None
    if find_spec("llguidance") is None:
        raise EngineError("a constraint needs llguidance, which is not installed: pip install 'specplug[llama-cpp]'")
    if sampling.json_schema is not None:
        return _of_schema(sampling.json_schema, sampling.strict)
    if sampling.regex is not None:
        return _of_text("regular expression", sampling.regex)
    assert sampling.lark is not None
    return _of_text("Lark grammar", sampling.lark)


def json_document(text: str, *, strict: bool) -> tuple[str, tuple[str, ...]]:
    """A JSON schema as text for `%json` in a Lark grammar, with its options in it; and what it does not enforce.

    Raises UsageError as `grammar_text` does.
    """
    document = _small_document if len(text) <= _SMALL_CHARS else _large_document
    return document(text, strict)


def _document(text: str, strict: bool) -> tuple[str, tuple[str, ...]]:
    prepared = prepare(text, strict=strict, compiles=_compile)
    return _with_options(prepared.text, {**prepared.options, **SPACING}), prepared.warnings


_small_document = lru_cache(maxsize=4 * 1024**2 // _SMALL_CHARS)(_document)
_large_document = lru_cache(maxsize=4 * 1024**2 // MAX_SCHEMA_BYTES)(_document)


@lru_cache(maxsize=16)
def _of_schema(text: str, strict: bool) -> GrammarText:
    prepared = prepare(text, strict=strict, compiles=_compile)

    def styled(spacing: Spacing) -> str:
        return _schema_grammar(prepared.text, {**prepared.options, **_fixed(spacing)})

    grammar = _schema_grammar(prepared.text, {**prepared.options, **SPACING})
    return GrammarText("JSON schema", grammar, styled, prepared.warnings)


@lru_cache(maxsize=16)
def _of_text(kind: str, text: str) -> GrammarText:
    from llguidance import LLMatcher

    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"the {kind} is not Unicode text") from None
    if size > MAX_BYTES[kind]:
        raise UsageError(f"the {kind} has more than {MAX_BYTES[kind] // 1024} KiB")
    grammar = LLMatcher.grammar_from_regex(text) if kind == "regular expression" else LLMatcher.grammar_from_lark(text)
    error, warnings = _validate(grammar)
    if error:
        lines = [line.strip() for line in error.splitlines()]
        reason = next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
        raise UsageError(f"the {kind} does not parse: {reason[:300]}")
    spaced = _options(SPACING)

    def styled(spacing: Spacing) -> str:
        return LLMatcher.grammar_from_lark(text.replace(spaced, _options(_fixed(spacing))))

    return GrammarText(kind, grammar, styled if spaced in text else None, tuple(warnings))


def _fixed(spacing: Spacing) -> dict[str, Any]:
    """llguidance's options for JSON with this spacing throughout."""
    return {"whitespace_flexible": False, "item_separator": spacing.item, "key_separator": spacing.key}


def _with_options(schema: str, options: Mapping[str, Any]) -> str:
    """The text of a schema, an object, that carries llguidance's options."""
    rest = schema.strip()[1:].lstrip()
    return '{"x-guidance": {' + _options(options) + ("}}" if rest == "}" else "}, " + rest)


def _options(options: Mapping[str, Any]) -> str:
    """Options as the members of a JSON object; those of white space are found again in a Lark grammar."""
    return json.dumps(options)[1:-1]


def _compile(text: str, options: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    try:
        return _validate(_schema_grammar(text, {**options, **SPACING}))
    except ValueError as error:  # such as a number that is out of range
        return str(error), ()


def _schema_grammar(text: str, options: Mapping[str, Any]) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]


def _validate(grammar: str) -> tuple[str, Sequence[str]]:
    """The error of a grammar, or "", and its warnings."""
    from llguidance import LLMatcher

    failed, lines = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    if failed:
        return lines[0], ()
    return "", [line for line in lines if not line.startswith("no tokenizer")]  # ids of tokens are checked later
