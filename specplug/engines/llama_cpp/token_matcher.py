"""The tokens that a grammar allows next, by llguidance: masks, forced tokens, and a walk along tokens and back.

Knows neither logits nor sampling. Where a grammar leaves one text only, the mask allows only the token with which
the tokenizer itself would write it, although other tokens would spell the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from specplug.constraints.json_spacing import Spacing, respaced, spacing_of
from specplug.errors import SpecplugError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

OpenStyle = Callable[[Sequence[int]], "LLMatcher | None"]
"""Opens a grammar with less choice after these tokens, or after others of the same meaning; None where it allows
neither."""


class TokenMatcher:
    """Where one text stands in a grammar; implements `specplug.core.TokenConstraint`.

    llguidance's matcher never recovers from a token that it does not allow, so tokens are tried before they are taken.
    It counts a token that ends the text in some states only, so such tokens are not passed to it.
    """

    def __init__(
        self, matcher: LLMatcher, end_tokens: Set[int], open_style: OpenStyle | None = None, taken: Sequence[int] = ()
    ) -> None:
        """
        end_tokens  all tokens that end an answer
        open_style  None where there is no grammar with less choice
        taken       the tokens that `matcher` has been moved past, and perhaps one that ends the text
        """
        self._matcher = matcher
        self._end_tokens = end_tokens
        self._open_style = open_style
        self._taken = list(taken)

    def copy(self) -> TokenMatcher:
        """A copy in the same place, which moves alone."""
        return TokenMatcher(self._matcher.deep_copy(), self._end_tokens, self._open_style, self._taken)

    def mask(self) -> npt.NDArray[np.uint8]:
        """uint8[V / 8]: a bit for each token, lowest first. Raises SpecplugError beyond llguidance's limits."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        _check(self._matcher)
        return bits

    @property
    def allows_nothing(self) -> bool:
        """Whether no text can follow, and none can end here. Raises SpecplugError beyond llguidance's limits."""
        trial = self._matcher.deep_copy()
        bits = np.frombuffer(trial.compute_bitmask(), dtype=np.uint8)
        if trial.get_error().startswith("NoExtension"):
            return True
        allowed = set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()) - self._end_tokens
        if allowed:
            trial.consume_token(min(allowed))  # some limits are found only after a token
        _check(trial)
        return not allowed and not self._matcher.is_accepting()

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` the masks allow, one after the other. Changes nothing."""
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
        return at + can_end

    def forced(self) -> list[int]:
        """The tokens that are the only ones allowed, one after the other; empty where there is a choice."""
        return [] if self._has_ended else self._matcher.compute_ff_tokens()

    def advance(self, tokens: Sequence[int]) -> None:
        """Move past `tokens`. ValueError, without a move, for tokens that are not allowed or beyond a limit."""
        text, ends = self._parts(tokens)
        moved = 0 if self._has_ended else self._matcher.try_consume_tokens(text)
        if self._matcher.is_error():
            raise ValueError(f"it is too complex: {first_line(self._matcher.get_error())}")
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
        matcher = self._open_style(self._taken)
        return None if matcher is None else TokenMatcher(matcher, self._end_tokens)

    @property
    def _has_ended(self) -> bool:
        return bool(self._taken) and self._taken[-1] in self._end_tokens

    def _parts(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """The tokens before the first one that ends the text, and whether there is such a token."""
        for at, token in enumerate(tokens):
            if token in self._end_tokens:
                return list(tokens[:at]), True
        return list(tokens), False


def open_styled(
    tokenizer: LLTokenizer,
    opened: Callable[[str], LLMatcher],
    styled: Callable[[Spacing], str],
    tokens: Sequence[int],
) -> LLMatcher | None:
    """The grammar with the spacing of a JSON text, after that text as if it had this spacing throughout.

    opened  opens a grammar at the beginning of a text
    styled  the text of the grammar with a spacing
    tokens  those of the JSON text so far
    """
    text = tokenizer.decode_bytes(list(tokens))
    spacing = spacing_of(text)
    matcher = opened(styled(spacing))
    same = tokenizer.tokenize_bytes(respaced(text, spacing))
    return matcher if matcher.try_consume_tokens(same) == len(same) and not matcher.is_error() else None


def _check(matcher: LLMatcher) -> None:
    """Raise SpecplugError if a matcher has met one of llguidance's limits."""
    if matcher.is_error():
        raise SpecplugError(f"the constraint is too complex: {first_line(matcher.get_error())}")


def first_line(text: str) -> str:
    """The first line of one of llguidance's messages."""
    return text.strip().partition("\n")[0]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    for at, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return at
    return min(len(left), len(right))
