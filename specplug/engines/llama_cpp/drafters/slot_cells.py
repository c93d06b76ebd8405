"""Which tokens of a text the cells of one of the drafter's slots hold.

Works on one sequence id of the drafter's context, and runs no pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.slots import common_prefix

SLACK = 64
"""Tokens by which the recent part of a window may grow before its oldest ones are removed."""


class SlotCells:
    """The cells of one slot, in order.

    With a window they hold the first tokens of the text, then its recent ones. A text that is read anew gets the recent
    tokens right after the first ones, in positions without a gap, as llama.cpp requires of tokens that are added. Later
    the oldest recent tokens are removed, which leaves a gap in the positions.

    tokens  the tokens of the cells: of the text, then of the latest draft
    valid   how many of them are tokens of the text
    read    tokens of the text up to the last valid one, those between the parts of the window included
    """

    def __init__(self, context: Context, seq: int, window: tuple[int, int] | None = None) -> None:
        """`window` is the number of first and of recent tokens; None keeps the complete text."""
        self.tokens: list[int] = []
        self.valid = 0
        self.read = 0
        self._context = context
        self._seq = seq
        self._window = window
        self._removed = 0
        """Positions of the gap, which lies after the first part."""

    @property
    def next_position(self) -> int:
        return len(self.tokens) + self._removed

    def start(self, prompt: IntArray) -> None:
        """Begin a text, with the tokens that its prompt (int32[n]) shares with the one before."""
        reusable = self.valid
        if self._window is not None and self._removed:
            reusable = min(reusable, self._window[0])
        self.valid = self.read = common_prefix(self.tokens[:reusable], prompt)

    def num_unread(self, known: int) -> int:
        """Tokens to read of a text of so many tokens, the last one included: its logits are needed."""
        if self._skips(known):
            assert self._window is not None
            first, recent = self._window
            return max(first - self.read, 0) + recent
        return max(known - self.read, 1)

    def prepare(self, text: Sequence[int], most: int, *, with_last: bool) -> Sequence[int]:
        """Make room for the next tokens of a text and return them, at most so many.

        with_last  its last token belongs to them, also where it was read before: then there is one at least
        """
        self.cut(self.valid)
        if self._skips(len(text)):
            assert self._window is not None
            first, recent = self._window
            if self.read < first:
                return text[self.read : min(first, self.read + most)]
            self.cut(first)
            self.read = len(text) - recent
        elif with_last and self.read >= len(text):
            self.cut(self.valid - 1)
            self.read = len(text) - 1
        return text[self.read : min(self.read + most, len(text) - (not with_last))]

    def append(self, tokens: Sequence[int], *, of_text: bool) -> None:
        """Tokens were evaluated after the others: the next ones of the text, or draft tokens."""
        self.tokens += tokens
        if of_text:
            self.valid += len(tokens)
            self.read += len(tokens)
            self._remove_oldest()

    def emitted(self, token: int, known: int) -> None:
        """A token was added to the text of `known` tokens: it may be the next draft token."""
        if self.read == known and self.valid < len(self.tokens) and self.tokens[self.valid] == token:
            self.valid += 1
            self.read += 1

    def restore(self, text: Sequence[int], state: bytes) -> None:
        """Load the target's cells of a text."""
        self.clear()
        self._context.restore(self._seq, state)
        self.append(text, of_text=True)

    def cut(self, length: int) -> None:
        """Remove all cells but the first `length` ones."""
        if length < len(self.tokens):
            gap = self._removed if self._window is not None and length > self._window[0] else 0
            self._context.drop(self._seq, length + gap)
            del self.tokens[length:]
            self._removed = gap
        self.valid = min(self.valid, length)

    def clear(self) -> None:
        """Remove all cells, those that an interrupted pass has left included."""
        self._context.drop(self._seq)
        self.tokens.clear()
        self.valid = self.read = self._removed = 0

    def _skips(self, known: int) -> bool:
        """Whether the text is read on after a part that the window leaves out."""
        if self._window is None:
            return False
        first, recent = self._window
        return known > first + recent and known - self.read > recent

    def _remove_oldest(self) -> None:
        if self._window is None or len(self.tokens) <= sum(self._window) + SLACK:
            return
        first = self._window[0]
        extra = len(self.tokens) - sum(self._window)
        start = first + self._removed
        self._context.drop(self._seq, start, start + extra)
        del self.tokens[first : first + extra]
        self.valid -= extra
        self._removed += extra
