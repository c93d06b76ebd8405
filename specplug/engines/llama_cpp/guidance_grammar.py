"""Opens a request's grammar with a model's tokenizer; a grammar that was compiled lately is not compiled again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Set
from functools import partial
from typing import TYPE_CHECKING, Any

from specplug.constraints.grammar_text import GrammarText, limits
from specplug.engines.llama_cpp.guidance_tokenizer import GuidanceTokenizer
from specplug.engines.llama_cpp.token_matcher import TokenMatcher, first_line, open_styled
from specplug.errors import SpecplugError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher

MOST_KEPT = 12
"""Compiled grammars that are kept, each with up to 20 MB of lexer states: one schema needs two or three."""


class Guidance:
    """llguidance for one model: its tokenizer, and grammars that were compiled with it. Close it before the model."""

    def __init__(self, vocab: Any, num_tokens: int, end_tokens: Set[int]) -> None:
        """
        vocab       llama.cpp's pointer to the vocabulary
        end_tokens  all tokens that end an answer
        """
        self._tokenizer = GuidanceTokenizer(vocab, num_tokens, end_tokens)
        self._end_tokens = end_tokens
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Build the tokenizer in a thread, before the first constraint needs it."""
        self._tokenizer.begin()

    def close(self) -> None:
        self._kept.clear()
        self._tokenizer.close()

    def open(self, grammar: GrammarText) -> TokenMatcher:
        """A matcher at the beginning of a text. Raises UsageError for a grammar that allows none, or is too complex."""
        opened = self._open(grammar.text)
        if opened.is_error():
            raise UsageError(f"the {grammar.kind} does not parse: {first_line(opened.get_error())}")
        open_style = partial(open_styled, self._tokenizer.get(), self._open, grammar.styled) if grammar.styled else None
        matcher = TokenMatcher(opened, self._end_tokens, open_style)
        try:
            empty = matcher.allows_nothing
        except SpecplugError as error:
            raise UsageError(f"the {grammar.kind}: {error}") from None
        if empty:
            raise UsageError(f"the {grammar.kind} allows no text")
        return matcher

    def _open(self, text: str) -> LLMatcher:
        """A copy of the compiled grammar; the copies share what they learn of its lexer."""
        from llguidance import LLMatcher

        with self._lock:
            kept = self._kept.get(text)
            if kept is None:
                kept = self._kept[text] = LLMatcher(self._tokenizer.get(), text, log_level=0, limits=limits())
                if len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(text)
            return kept.deep_copy()
