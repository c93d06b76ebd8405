"""Which tokens of a text the cells of one of the drafter's slots hold.

Works on one sequence id of the drafter's context, and runs no pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specplug.core import IntArray, int_array
from specplug.drafts.retrieval import Retrieval, Span, Window
from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.slots import common_prefix

SLACK = 64
"""Tokens by which the recent part of a window may grow before its oldest ones are removed."""


class SlotCells:
    """The cells of one slot, in order.

    With a window they hold the first tokens of the text, then retrieved chunks, then its recent tokens. A text that is
    read anew gets the chunks and the recent tokens right after the first ones, in positions without a gap, as llama.cpp
    requires of tokens that are added. Cells that are copied from the target keep the positions of the text. The oldest
    recent tokens are removed later, which leaves a gap in the positions.

    tokens  the tokens of the cells: of the text, then of the latest draft
    valid   how many of them are tokens of the text
    read    tokens of the text up to the last valid one, those between the parts of the window included
    """

    def __init__(
        self,
        context: Context,
        seq: int,
        window: Window | None = None,
        is_control: Callable[[int], bool] = lambda token: False,
    ) -> None:
        """
        window      None keeps the complete text
        is_control  tells the tokens that separate the turns of a conversation
        """
        self.tokens: list[int] = []
        self.valid = 0
        self.read = 0
        self._context = context
        self._seq = seq
        self._window = window
        self._retrieval = None if window is None else Retrieval(window, is_control)
        self._lead: list[int] = []
        """The tokens before the recent ones, where a part of the text is left out."""
        self._leading = False
        """Whether `_lead` is being read; meanwhile `read` is 0."""
        self._removed = 0
        """Positions of all gaps. The last one lies after the lead; cells before the first one are in `_before_gap`."""
        self._before_gap = 0

    @property
    def next_position(self) -> int:
        return len(self.tokens) + self._removed

    def start(self, prompt: IntArray) -> None:
        """Begin a text, with the tokens that its prompt (int32[n]) shares with the one before."""
        self.valid = self.read = common_prefix(self.tokens[: min(self.valid, self._gapless)], prompt)
        self._lead, self._leading = [], False
        if self._retrieval is not None:
            self._retrieval.start(prompt)

    def num_unread(self, known: int) -> int:
        """Tokens to read of a text of so many tokens, the last one included: its logits are needed."""
        if self._skips(known):
            assert self._window is not None
            if self._leading:
                return len(self._lead) - self.valid + self._window.recent
            return self._window.size - min(self.valid, self._window.first)
        return max(known - self.read, 1)

    def num_kept(self, known: int) -> int:
        """Most tokens that are kept of a text of so many tokens."""
        return known if self._window is None else min(known, self._window.size)

    def spans(self, text: Sequence[int]) -> list[Span]:
        """The parts of a text that are kept, in order."""
        return [(0, len(text))] if self._retrieval is None else self._retrieval.spans(text)

    def choose_again(self, text: Sequence[int]) -> bool:
        """Choose the retrieved chunks again; whether others have to be read now. Cells that are kept stay valid."""
        if self._retrieval is None or not self._retrieval.choose_again(text):
            return False
        self._begin_lead(text)
        return True

    def prepare(self, text: Sequence[int], most: int, *, with_last: bool) -> Sequence[int]:
        """Make room for the next tokens of a text and return them, at most so many.

        with_last  its last token belongs to them, also where it was read before: then there is one at least
        """
        if self._skips(len(text)):
            assert self._window is not None
            if not self._leading:
                self._begin_lead(text)
            self.cut(self.valid)
            if self.valid < len(self._lead):
                return self._lead[self.valid : self.valid + most]
            self._leading = False
            self.read = len(text) - self._window.recent
        else:
            self.cut(self.valid)
            if with_last and self.read >= len(text):
                self.cut(self.valid - 1)
                self.read = len(text) - 1
        return text[self.read : min(self.read + most, len(text) - (not with_last))]

    def append(self, tokens: Sequence[int], *, of_text: bool) -> None:
        """Tokens were evaluated after the others: those that `prepare` returned, or draft tokens."""
        self.tokens += tokens
        if of_text:
            self.valid += len(tokens)
            if not self._leading:
                self.read += len(tokens)
                self._remove_oldest()

    def emitted(self, token: int, known: int) -> None:
        """A token was added to the text of `known` tokens: it may be the next draft token."""
        if self.read == known and self.valid < len(self.tokens) and self.tokens[self.valid] == token:
            self.valid += 1
            self.read += 1

    def restore(self, text: Sequence[int], spans: Sequence[Span], state: bytes) -> None:
        """Load the target's cells of parts of a text, of which the last one has its last token."""
        self.clear()
        self._context.restore(self._seq, state)
        self._lead = [token for start, stop in spans[:-1] for token in text[start:stop]]
        self.tokens = self._lead + list(text[slice(*spans[-1])])
        self.valid, self.read = len(self.tokens), len(text)
        self._removed = len(text) - len(self.tokens)
        self._before_gap = spans[0][1]

    def cut(self, length: int) -> None:
        """Remove all cells but the first `length` ones."""
        if length < len(self.tokens):
            gap = self._removed if length > self._gapless else 0
            self._context.drop(self._seq, length + gap)
            del self.tokens[length:]
            self._removed = gap
        self.valid = min(self.valid, length)

    def clear(self) -> None:
        """Remove all cells, those that an interrupted pass has left included."""
        self._context.drop(self._seq)
        self.tokens.clear()
        self.valid = self.read = self._removed = 0
        self._lead, self._leading = [], False

    @property
    def _gapless(self) -> int:
        """The cells at the positions from 0 on, without a gap."""
        return self._before_gap if self._removed else len(self.tokens)

    def _skips(self, known: int) -> bool:
        """Whether the text is read on after a part that the window leaves out."""
        if self._window is None:
            return False
        return self._leading or (known > self._window.size and known - self.read > self._window.recent)

    def _begin_lead(self, text: Sequence[int]) -> None:
        """Begin to read the parts of the text before the recent one, after those that the cells already hold."""
        self._lead = [token for start, stop in self.spans(text)[:-1] for token in text[start:stop]]
        self.valid = common_prefix(self.tokens[: self._gapless], int_array(self._lead))
        self.read, self._leading = 0, True

    def _remove_oldest(self) -> None:
        if self._window is None or len(self.tokens) <= self._window.size + SLACK:
            return
        lead = len(self._lead) or self._window.first
        extra = len(self.tokens) - self._window.size
        start = lead + self._removed
        self._context.drop(self._seq, start, start + extra)
        del self.tokens[lead : lead + extra]
        self.valid -= extra
        if not self._removed:
            self._before_gap = lead
        self._removed += extra


def cells_per_slot(max_tokens: int, max_draft: int, window: Window | None) -> int:
    """KV cells that one sequence needs at most."""
    # Recent tokens are removed after others were added, which are no more than the window has.
    text = max_tokens if window is None else min(max_tokens, window.size + window.recent + SLACK)
    return text + max_draft + 1
