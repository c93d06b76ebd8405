"""The tokens that a grammar allows next, by llguidance: masks, forced tokens, and a walk along tokens and back.

Knows neither logits nor sampling. Where a grammar leaves one text only, the mask allows only the token with which
the tokenizer itself would write it, although other tokens would spell the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from specplug.errors import SpecplugError

if TYPE_CHECKING:
    from llguidance import LLMatcher

OpenStyle = Callable[[Sequence[int]], "TokenMatcher | None"]
"""Opens a grammar with less choice after these tokens, or after others of the same meaning; None where there is none
that allows them."""


class TokenMatcher:
    """Where one text stands in a grammar; implements `specplug.core.TokenConstraint`.

    llguidance's matcher never recovers from a token that it does not allow, so tokens are tried before they are taken.
    It counts a token that ends the text in some states only, so such tokens are not passed to it.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        end_tokens: Set[int],
        open_style: OpenStyle | None = None,
        taken: Sequence[int] = (),
        at_limit: Callable[[], None] = lambda: None,
    ) -> None:
        """
        end_tokens  all tokens that end an answer
        open_style  None where there is no grammar with less choice
        taken       the tokens that `matcher` has been moved past, and perhaps one that ends the text
        at_limit    called where `matcher` has met one of llguidance's limits, and is of no use any more
        """
        self._matcher = matcher
        self._end_tokens = end_tokens
        self._open_style = open_style
        self._taken = list(taken)
        self._at_limit = at_limit

    def copy(self) -> TokenMatcher:
        """A copy in the same place, which moves alone; llguidance's limits apply to all copies together."""
        return TokenMatcher(self._matcher.deep_copy(), self._end_tokens, self._open_style, self._taken, self._at_limit)

    def mask(self) -> npt.NDArray[np.uint8]:
        """uint8[V / 8]: a bit for each token, lowest first. Raises SpecplugError beyond llguidance's limits."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return bits

    @property
    def allows_nothing(self) -> bool:
        """Whether no text can follow, and none can end here. Raises SpecplugError beyond llguidance's limits."""
        trial = self.copy()
        bits = np.frombuffer(trial._matcher.compute_bitmask(), dtype=np.uint8)
        if trial._matcher.get_error().startswith("NoExtension"):
            return True
        allowed = set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()) - self._end_tokens
        if allowed:
            trial._matcher.consume_token(min(allowed))  # some limits are found only after a token
        trial._check()
        return not allowed and not self._matcher.is_accepting()

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` the masks allow, one after the other; 0 beyond llguidance's limits. Changes nothing."""
        if self._has_ended:
            return 0
        matcher, at = self._matcher, 0
        text, ends = self._parts(tokens)
        most = matcher.validate_tokens(text)
        while at < most:
            forced = matcher.compute_ff_tokens() or [text[at]]
            same = _common(forced, text[at:most])
            matcher.consume_tokens(forced[:same])
            at += same
            if same < len(forced):
                break
        can_end = ends and at == len(text) and matcher.is_accepting()
        matcher.rollback(at)
        return 0 if self._is_spoilt() else at + can_end

    def forced(self) -> list[int]:
        """The tokens that are the only ones allowed, one after the other; empty where there is a choice."""
        forced = [] if self._has_ended else self._matcher.compute_ff_tokens()
        return [] if self._is_spoilt() else forced

    def advance(self, tokens: Sequence[int]) -> None:
        """Move past `tokens`. Raises ValueError, without a move, for tokens that are not allowed, and SpecplugError
        beyond llguidance's limits."""
        text, ends = self._parts(tokens)
        moved = 0 if self._has_ended else self._matcher.try_consume_tokens(text)
        self._check()
        if moved + ends < len(tokens) or (ends and not self._matcher.is_accepting()):
            self._matcher.rollback(moved)
            raise ValueError(f"it does not allow {list(tokens)} here")
        self._taken += tokens

    def go_back(self, count: int) -> None:
        """Undo the last `count` tokens of `advance`."""
        if count:
            self._matcher.rollback(count - self._has_ended)
            del self._taken[-count:]

    def style(self) -> TokenMatcher | None:
        """That of a grammar with less choice, after the tokens so far; None where it does not allow them."""
        if self._open_style is None or self._has_ended:
            return None
        return self._open_style(self._taken)

    @property
    def _has_ended(self) -> bool:
        return bool(self._taken) and self._taken[-1] in self._end_tokens

    def _is_spoilt(self) -> bool:
        """Whether the matcher has met one of llguidance's limits; then it allows nothing."""
        if self._matcher.is_error():
            self._at_limit()
            return True
        return False

    def _check(self) -> None:
        """Raise SpecplugError if the matcher has met one of llguidance's limits."""
        if self._is_spoilt():
            raise SpecplugError(f"the constraint is too complex: {first_line(self._matcher.get_error())}")

    def _parts(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """The tokens before the first one that ends the text, and whether there is such a token."""
        for at, token in enumerate(tokens):
            if token in self._end_tokens:
                return list(tokens[:at]), True
        return list(tokens), False


def first_line(text: str) -> str:
    """The first line of one of llguidance's messages."""
    return text.strip().partition("\n")[0]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    for at, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return at
    return min(len(left), len(right))
