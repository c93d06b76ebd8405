"""Where an answer stands in its grammar: for the sampler, and apart from that for drafts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from specplug.engines.llama_cpp.token_matcher import TokenMatcher
from specplug.errors import SpecplugError


class GuidedText:
    """A matcher along the emitted tokens, and one of the same grammar for drafts, whose lexer is another one.

    llguidance counts the states of a lexer over all copies of a matcher, against one limit. With the same lexer, draft
    tokens that are never emitted would bring an answer to that limit which plain decoding does not reach.
    """

    def __init__(self, matcher: TokenMatcher, drafts: TokenMatcher) -> None:
        """Takes over both; they are in the same place and share no lexer."""
        self._matcher = matcher
        self._drafts = drafts
        self._behind: list[int] = []
        """The emitted tokens that `drafts` has not been moved past."""

    def mask(self) -> npt.NDArray[np.uint8]:
        """uint8[V / 8]: the tokens that are allowed next, a bit for each, lowest first. Raises SpecplugError beyond
        llguidance's limits."""
        return self._matcher.mask()

    def advance(self, tokens: Sequence[int]) -> None:
        """Move past emitted tokens. Raises as `TokenMatcher.advance`."""
        self._matcher.advance(tokens)
        self._behind += tokens

    def for_drafts(self) -> TokenMatcher:
        """A matcher in the same place, which moves alone and shares no lexer with that of the emitted tokens.

        Beyond llguidance's limits it allows nothing.
        """
        behind, self._behind = self._behind, []
        # Where one copy has met a limit, others refuse tokens; the emitted ones need not have met it.
        with suppress(ValueError, SpecplugError):
            self._drafts.advance(behind)
        return self._drafts.copy()

    def copy_for_drafts(self) -> GuidedText:
        """A text that goes on from here with draft tokens."""
        return GuidedText(self.for_drafts(), self._drafts.copy())
