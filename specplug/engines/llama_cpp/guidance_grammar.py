"""Compiles a request's JSON schema, regular expression or Lark grammar with llguidance, within limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from specplug.engines.llama_cpp.guidance_tokenizer import GuidanceTokenizer
from specplug.engines.llama_cpp.token_matcher import TokenMatcher, first_line
from specplug.errors import UsageError
from specplug.generation.answers import Sampling

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

SPACING: JsonCompileOptions = {"whitespace_pattern": " "}
"""Between the parts of JSON there is a space or none: models write both, and could go on with line breaks for ever."""

STYLES: Sequence[JsonCompileOptions] = tuple(
    {"whitespace_flexible": False, "item_separator": item, "key_separator": key}
    for item, key in ((", ", ": "), (", ", ":"), (",", ":"), (",", ": "))
)
"""The spacings that models keep to, Python's first: with and without a space after a comma and after a colon."""


def open_matcher(tokenizer: GuidanceTokenizer, sampling: Sampling) -> tuple[TokenMatcher, list[str]]:
    """The matcher that a request asks for, and what it does not enforce, one line each.

    Raises UsageError for a constraint that does not parse, that is beyond the limits or that allows nothing.
    """
    from llguidance import LLMatcher

    if sampling.lark is not None:
        kind, texts = "Lark grammar", [LLMatcher.grammar_from_lark(sampling.lark)]
    elif sampling.regex is not None:
        kind, texts = "regular expression", [LLMatcher.grammar_from_regex(sampling.regex)]
    else:
        assert sampling.json_schema is not None
        kind = "JSON schema"
        try:
            schema = json.loads(sampling.json_schema)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the JSON schema is not JSON: {error}") from error
        texts = [
            LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={**spacing, "lenient": True})
            for spacing in (SPACING, *STYLES)
        ]
    opened = _open(tokenizer.get(), texts[0])
    if opened.is_error():
        raise UsageError(f"the {kind} does not parse: {first_line(opened.get_error())}")
    matcher = TokenMatcher(opened, tokenizer.end_tokens, [partial(_open, tokenizer.get(), text) for text in texts[1:]])
    if matcher.allows_nothing:
        raise UsageError(f"the {kind} allows no text at all")
    return matcher, list(opened.get_grammar_warnings())


def _open(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
