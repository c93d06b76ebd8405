"""Which texts have a row of the pool of a drafter with a short context, which tokens it keeps, and who is drafted for.

Works on the host with the tokens that it knows: those of prompts, and of answers some steps later. It depends neither
on vLLM nor on torch, and reads no clock, so that all ranks choose the same.
State: per text its tokens, its row, and what was accepted when its parts were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from specplug.core import IntArray, int_array
from specplug.drafts.retrieval import Retrieval, Window
from specplug.engines.vllm.v2.draft_pause import DraftPause

EMPTY = -1
"""Fills up chosen positions."""

LEAST_EMITTED = 64
"""Tokens of the answer between two choices for a text, at least. Chosen; llama.cpp's drafter has the same number."""

MOST_EMITTED = 1024
"""The most that it grows to: it doubles where the same parts are chosen again."""

GOOD_AGREEMENT = 0.8
"""Parts are not chosen again while this share of the draft tokens is right. Chosen."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The parts of a text that a row is to keep, beside the recent tokens.

    positions  int32[lead]: positions in the text, then EMPTY
    least      the position from which on recent tokens are kept
    """

    row: int
    slot: int
    positions: IntArray
    least: int


@dataclass(slots=True)
class _Kept:
    """A text that has a row.

    wait          tokens of the answer until the next choice
    row           None while all rows are taken
    chosen_at     tokens that the text had when its parts were chosen
    right, wrong  draft tokens up to then
    pause         whether the text is drafted for
    """

    text: list[int]
    retrieval: Retrieval
    wait: int
    row: int | None = None
    chosen_at: int = 0
    right: int = 0
    wrong: int = 0
    pause: DraftPause = field(default_factory=DraftPause)


def needs_row(window: Window, num_tokens: int) -> bool:
    """Whether a text that begins with so many tokens is drafted for: of a shorter one the window leaves nothing out."""
    return num_tokens > window.size


class KeptTexts:
    """Gives rows to the texts that are longer than the window, in the order in which they start."""

    def __init__(self, window: Window, rows: int, is_control: Callable[[int], bool] = lambda token: False) -> None:
        """`is_control` tells the tokens that separate the turns of a conversation."""
        self.window = window
        self.lead = window.first + window.retrieved
        self.first_choices = 0
        self.repeated_choices = 0
        self._is_control = is_control
        self._free = list(range(rows))
        self._texts: dict[int, _Kept] = {}

    def begin(self, slot: int, text: Sequence[int]) -> None:
        """A text takes a slot of the runner, which the text that had it before leaves if it still has it."""
        self.end(slot)
        if not needs_row(self.window, len(text)):
            return
        retrieval = Retrieval(self.window, self._is_control)
        retrieval.start(int_array(text))
        self._texts[slot] = _Kept(list(text), retrieval, wait=LEAST_EMITTED)

    def end(self, slot: int) -> None:
        """A text leaves its slot."""
        kept = self._texts.pop(slot, None)
        if kept is not None and kept.row is not None:
            self._free = sorted([*self._free, kept.row])

    def row_of(self, slot: int) -> int | None:
        """The row of a text; None if it has none."""
        kept = self._texts.get(slot)
        return None if kept is None else kept.row

    def rows(self) -> dict[int, int]:
        """The slots of the texts that have a row, by row."""
        return {kept.row: slot for slot, kept in self._texts.items() if kept.row is not None}

    def start(self, read: Collection[int]) -> list[Choice]:
        """Give free rows to texts without one, and choose their parts.

        read  the slots of texts whose prompts the target has read; of the others, keys are missing
        """
        found = []
        for slot, kept in self._texts.items():
            if kept.row is None and slot in read and self._free:
                kept.row = self._free.pop(0)
                self.first_choices += 1
                found.append(self._choice(slot, kept))
        return found

    def is_paused(self, slot: int) -> bool:
        """Whether nothing is drafted for a text that has a row, since that did not pay."""
        return self._texts[slot].pause.until is not None

    def known(self, slot: int) -> int:
        """The number of tokens of a text that are known here."""
        return len(self._texts[slot].text)

    def learn(
        self, slot: int, written: Sequence[int], right: int, wrong: int, price: Callable[[int], float]
    ) -> Choice | None:
        """Other parts, where too few draft tokens are right and the text so far suggests others.

        written  the tokens that follow the known ones
        right    draft tokens of the text that the target agreed with, since it has its row
        wrong    those it did not agree with; what follows such a token is not counted
        price    of a draft token in passes of the target, for a text of so many tokens
        """
        kept = self._texts[slot]
        kept.text += written
        kept.pause.learn(len(kept.text), right, wrong, price(len(kept.text)))
        since = right - kept.right, wrong - kept.wrong
        if len(kept.text) - kept.chosen_at < kept.wait or since[0] >= GOOD_AGREEMENT * sum(since):
            return None
        kept.right, kept.wrong, kept.chosen_at = right, wrong, len(kept.text)
        self.repeated_choices += 1
        if not kept.retrieval.choose_again(kept.text):
            kept.wait = min(2 * kept.wait, MOST_EMITTED)
            return None
        kept.wait = LEAST_EMITTED
        return self._choice(slot, kept)

    def _choice(self, slot: int, kept: _Kept) -> Choice:
        assert kept.row is not None
        kept.chosen_at = len(kept.text)
        end = len(kept.text) - self.window.recent
        parts = [np.arange(start, min(stop, end)) for start, stop in kept.retrieval.spans(kept.text)]
        chosen = np.concatenate(parts)[: self.lead]
        positions = np.full(self.lead, EMPTY, dtype=np.int32)
        positions[: len(chosen)] = chosen
        return Choice(kept.row, slot, positions, max(end, 0))
