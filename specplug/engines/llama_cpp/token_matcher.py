"""The tokens that a grammar allows next, by llguidance: masks, forced tokens, and a walk along tokens and back.

Knows neither logits nor sampling. Where a grammar leaves one text only, the mask allows only the token with which
the tokenizer itself would write it, although other tokens would spell the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from specplug.errors import SpecplugError

if TYPE_CHECKING:
    from llguidance import LLMatcher

Open = Callable[[], "LLMatcher"]
"""Opens a matcher at the beginning of the text."""


class TokenMatcher:
    """Where one text stands in a grammar; implements `specplug.core.TokenConstraint`.

    llguidance's matcher never recovers from a token that it does not allow, so tokens are tried before they are taken.
    """

    def __init__(
        self, matcher: LLMatcher, end_tokens: Set[int], open_styles: Sequence[Open] = (), taken: Sequence[int] = ()
    ) -> None:
        """
        end_tokens   all tokens that end an answer
        open_styles  grammars of some of the same texts, which leave less choice
        taken        the tokens that `matcher` has been moved past
        """
        self._matcher = matcher
        self._end_tokens = end_tokens
        self._open_styles = open_styles
        self._taken = list(taken)

    def copy(self) -> TokenMatcher:
        """A copy in the same place, which moves alone."""
        return TokenMatcher(self._matcher.deep_copy(), self._end_tokens, self._open_styles, self._taken)

    def mask(self) -> npt.NDArray[np.uint8]:
        """uint8[V / 8]: a bit for each token, lowest first. Raises SpecplugError beyond llguidance's limits."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise SpecplugError(f"the grammar is too complex here: {first_line(self._matcher.get_error())}")
        return bits

    @property
    def allows_nothing(self) -> bool:
        """Whether no text can follow, and none can end here."""
        return self._matcher.is_stopped() and not self._matcher.is_accepting()

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` the masks allow, one after the other. Changes nothing."""
        matcher, at = self._matcher, 0
        most = matcher.validate_tokens(list(tokens))
        while at < most:
            forced = matcher.compute_ff_tokens() or [tokens[at]]
            same = _common(forced, tokens[at:most])
            matcher.consume_tokens(forced[:same])
            at += same
            if same < len(forced):
                break
        ends = at == most and self._ends(tokens[at : at + 1])
        matcher.rollback(at)
        return at + ends

    def forced(self) -> list[int]:
        """The tokens that are the only ones allowed, one after the other; empty where there is a choice."""
        return list(self._matcher.compute_ff_tokens())

    def advance(self, tokens: Sequence[int]) -> None:
        """Move past `tokens`. ValueError, without a move, for tokens that are not allowed."""
        moved = self._matcher.try_consume_tokens(list(tokens))
        if moved == len(tokens) - 1 and self._ends(tokens[moved:]):
            moved += self._matcher.consume_token(tokens[moved])
        if moved < len(tokens):
            self._matcher.rollback(moved)
            raise ValueError(f"the constraint does not allow {list(tokens)} here")
        self._taken += tokens

    def go_back(self, count: int) -> None:
        """Undo the last `count` tokens of `advance`."""
        if count:
            self._matcher.rollback(count)
            del self._taken[-count:]

    def styles(self) -> list[TokenMatcher]:
        """Those of the grammars with less choice that allow all tokens so far, after these tokens."""
        found = []
        for open_style in self._open_styles:
            style = TokenMatcher(open_style(), self._end_tokens)
            with suppress(ValueError):
                style.advance(self._taken)
                found.append(style)
        return found

    def _ends(self, tokens: Sequence[int]) -> bool:
        """Whether the first of `tokens` ends the answer, and it may end here."""
        return bool(tokens) and tokens[0] in self._end_tokens and self._matcher.is_accepting()


def first_line(text: str) -> str:
    """The first line of one of llguidance's messages."""
    return text.strip().partition("\n")[0]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    for at, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return at
    return min(len(left), len(right))
