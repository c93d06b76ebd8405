"""Opens a request's grammar with a model's tokenizer: a matcher for its answer, and others for drafts.

llguidance counts the states of a lexer over all copies of a matcher, against one limit. So an answer gets a matcher of
its own, for which its grammar is compiled anew; matchers for drafts, which change no output, are copies of kept ones.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from specplug.constraints.grammar_text import GrammarText, limits
from specplug.constraints.json_spacing import PYTHONS, Spacing, respaced, spacing_of
from specplug.engines.llama_cpp.guidance_tokenizer import GuidanceTokenizer
from specplug.engines.llama_cpp.guided_text import GuidedText
from specplug.engines.llama_cpp.token_matcher import OpenStyle, TokenMatcher, first_line
from specplug.errors import SpecplugError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher

Key = tuple[str, Spacing | None]
"""The text of a grammar; the spacing of a style of it, or None for the grammar itself."""

MOST_KEPT = 12
"""Compiled grammars that are kept, each with up to 20 MB of lexer states: one schema needs two or three."""

QUICK_CHARS = 4 * 1024
"""Characters of a grammar that the engine's thread may compile: a schema of that size takes less than 10 ms."""


class Guidance:
    """llguidance for one model: its tokenizer, and grammars that were compiled with it. Close it before the model."""

    def __init__(self, tokenizer: GuidanceTokenizer) -> None:
        """Takes over `tokenizer`."""
        self._tokenizer = tokenizer
        self._end_tokens = tokenizer.end_tokens
        self._kept: OrderedDict[Key, LLMatcher] = OrderedDict()
        """At the beginning of a text."""
        self._lock = threading.Lock()  # guards _kept

    @property
    def end_token(self) -> int:
        """One of the tokens that end an answer."""
        return min(self._end_tokens)

    def begin(self) -> None:
        """Build the tokenizer in a thread, before the first constraint needs it."""
        self._tokenizer.begin()

    def close(self) -> None:
        with self._lock:
            self._kept.clear()
        self._tokenizer.close()

    def open(self, grammar: GrammarText) -> GuidedText:
        """A text at its beginning. Compiles the grammar, and what drafts need of it, where that is not kept.

        Raises UsageError for a grammar that allows no text, or is too complex.
        """
        opened = self._compile(grammar.text)
        if opened.is_error():
            raise UsageError(f"the {grammar.kind} does not parse: {first_line(opened.get_error())}")
        matcher = TokenMatcher(opened, self._end_tokens)
        try:
            empty = matcher.allows_nothing
        except SpecplugError as error:
            raise UsageError(f"the {grammar.kind}: {error}") from None
        if empty:
            raise UsageError(f"the {grammar.kind} allows no text")
        return GuidedText(matcher, self._for_drafts(grammar))

    def style(self, grammar: GrammarText, tokens: Sequence[int]) -> TokenMatcher | None:
        """The grammar with one spacing, that of the JSON in a text so far, after that text as if it always had it.

        tokens  those of the text so far
        None where the text does not fit, and where a grammar of more than QUICK_CHARS would have to be compiled.
        """
        text = self._tokenizer.get().decode_bytes(list(tokens))
        spacing = spacing_of(text)
        matcher = self._styled(grammar, spacing, QUICK_CHARS)
        if matcher is None:
            return None
        try:
            matcher.advance(self._tokenizer.get().tokenize_bytes(respaced(text, spacing)))
        except (ValueError, SpecplugError):
            return None
        return matcher

    def _for_drafts(self, grammar: GrammarText) -> TokenMatcher:
        key = grammar.text, None
        kept = self._get(key)
        if kept is None:
            kept = self._keep(key, self._compile(grammar.text))
        if grammar.styled is None:
            return self._copy(key, kept)
        self._styled(grammar, PYTHONS)  # most texts begin in this style
        return self._copy(key, kept, partial(self.style, grammar))

    def _styled(self, grammar: GrammarText, spacing: Spacing, most: int | None = None) -> TokenMatcher | None:
        """The style at the beginning of a text; None where a grammar of more than `most` characters is not kept."""
        key = grammar.text, spacing
        kept = self._get(key)
        if kept is None:
            if grammar.styled is None or (most is not None and len(grammar.text) > most):
                return None
            kept = self._keep(key, self._compile(grammar.styled(spacing)))
        return self._copy(key, kept)

    def _copy(self, key: Key, kept: LLMatcher, open_style: OpenStyle | None = None) -> TokenMatcher:
        """A copy of a kept matcher, which is forgotten as soon as its copies have used up the limits together."""
        return TokenMatcher(kept.deep_copy(), self._end_tokens, open_style, at_limit=partial(self._forget, key, kept))

    def _get(self, key: Key) -> LLMatcher | None:
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
            return kept

    def _keep(self, key: Key, compiled: LLMatcher) -> LLMatcher:
        with self._lock:
            self._kept[key] = compiled
            self._kept.move_to_end(key)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return compiled

    def _forget(self, key: Key, kept: LLMatcher) -> None:
        with self._lock:
            if self._kept.get(key) is kept:
                del self._kept[key]

    def _compile(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer.get(), text, log_level=0, limits=limits())
