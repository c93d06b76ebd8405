"""Chooses after how many layers a self-drafter ends, or that it does not draft.

Every exit has discounted counts of right and wrong draft tokens: of drafts, or of its likeliest tokens where another
exit drafted. The exit is chosen that is expected to save most time per token; a change must save, over the next tokens,
what reading the text with the other exit takes. The module depends on counts and milliseconds, not on layers, a model
or an engine; the exits can be any drafters for the same text.
Source: DEL (arXiv 2504.05598), with measured milliseconds in place of layers, and with plain decoding as a choice.
State: four numbers per exit. Cost per round: one `saved_ms` per exit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

from specplug.planning.constants import (
    BEST_RATE,
    EXIT_DECAY,
    EXIT_FADING,
    EXIT_HORIZON,
    EXIT_PRIOR_WEIGHT,
    FIRST_RATE,
)

LAYER_LIMIT = 18
"""Draft tokens of the longest chain of DEL, which is also the largest number by which it compares exits."""


@dataclass(slots=True)
class _Counts:
    """Of one exit, discounted: right and wrong tokens, and the sums of the probabilities that the exit gave them."""

    right: float = 0.0
    wrong: float = 0.0
    right_confidence: float = 0.0
    wrong_confidence: float = 0.0

    def scale(self, factor: float) -> None:
        self.right *= factor
        self.wrong *= factor
        self.right_confidence *= factor
        self.wrong_confidence *= factor


def best_length(rate: float, draft: float, most: int) -> tuple[float, int]:
    """By how much chains of the best length shorten the time per emitted token, and that length.

    rate   the share of right draft tokens, given that those before them were right
    draft  the time of a draft token; the unit is the time of a pass that verifies any number of them
    most   of draft tokens

    (0.0, 0) where no length saves time.
    """
    best, length, tokens, p = 0.0, 0, 1.0, 1.0
    for count in range(1, most + 1):
        p *= rate
        tokens += p
        saved = 1 - (1 + count * draft) / tokens
        if saved > best:
            best, length = saved, count
    return best, length


class ExitChoice:
    """The exit to draft with, as an index; `current` is None where plain decoding is expected to be fastest."""

    def __init__(self, count: int) -> None:
        """`count` exits, cheapest first; the first one is chosen before anything was learned."""
        self.current: int | None = 0
        self._counts = [_Counts() for _ in range(count)]

    def learn(self, exit_: int, right: Sequence[float], wrong: Sequence[float]) -> None:
        """Count one round of an exit: the probabilities that it gave to its right and to its wrong tokens.

        The tokens of a round follow text that was right, so that each of them was tested.
        """
        counts = self._counts[exit_]
        counts.scale(EXIT_DECAY)
        counts.right += len(right)
        counts.wrong += len(wrong)
        counts.right_confidence += sum(right)
        counts.wrong_confidence += sum(wrong)

    def fade(self) -> None:
        """Make what is known of the other exits a little less certain, after a round in which one exit drafted."""
        for exit_, counts in enumerate(self._counts):
            if exit_ != self.current:
                counts.scale(EXIT_FADING)

    def age(self) -> None:
        """Make what is known of all exits less certain, by a round in which nothing was learned."""
        for counts in self._counts:
            counts.scale(EXIT_DECAY)

    def rate(self, exit_: int) -> float:
        """The expected share of right draft tokens, given that those before them were right."""
        counts = self._counts[exit_]
        tested = counts.right + counts.wrong
        return (counts.right + EXIT_PRIOR_WEIGHT * FIRST_RATE) / (tested + EXIT_PRIOR_WEIGHT)

    def hopeful_rate(self, exit_: int) -> float:
        """The share of right draft tokens that can be hoped for after those that were tested."""
        tested = self._counts[exit_].right + self._counts[exit_].wrong
        return min(BEST_RATE, self.rate(exit_) + 1 / sqrt(tested + EXIT_PRIOR_WEIGHT))

    def choose(
        self,
        saved_ms: Callable[[float, float], float],
        draft_ms: Sequence[float],
        change_ms: Sequence[float],
    ) -> int | None:
        """Choose by time, and return the choice.

        saved_ms   of a share of right draft tokens and the milliseconds of a draft token: the time saved per emitted
                   token by chains of the best length; not above 0 where drafts lose
        draft_ms   milliseconds of a draft token, by exit
        change_ms  milliseconds until an exit could draft, by exit: reading or copying what its cache lacks
        """
        saved = [saved_ms(self.rate(exit_), ms) for exit_, ms in enumerate(draft_ms)]
        best = max(range(len(saved)), key=lambda exit_: (saved[exit_], -exit_))
        now = 0.0 if self.current is None else max(saved[self.current], 0.0)
        if self.current is not None and saved[self.current] <= 0:
            self.current = None
        if saved[best] > 0 and (saved[best] - now) * EXIT_HORIZON > change_ms[best]:
            self.current = best
        return self.current

    # -- the rules of the paper -----------------------------------------------------------------------------------

    def choose_by_layers(self, layers: Sequence[int], total: int) -> int:
        """Choose by tokens per layer, as DEL does, and return the choice.

        layers  of each exit
        total   of the target
        """
        best, choice = 0.0, 0
        for exit_, own in enumerate(layers):
            counts = self._counts[exit_]
            tested = counts.right + counts.wrong
            rate = counts.right / tested if tested else 0.0
            tokens, p = 1.0, 1.0
            for length in range(1, LAYER_LIMIT):
                p *= rate
                tokens += p
                if tokens / (total + length * own) > best:
                    best, choice = tokens / (total + length * own), exit_
        self.current = choice
        return choice

    def threshold(self, exit_: int) -> float:
        """The probability of a draft token below which DEL drafts no further: the midpoint between the mean of right
        tokens and that of wrong ones; 0 while one of them is unknown."""
        counts = self._counts[exit_]
        if not counts.right or not counts.wrong:
            return 0.0
        return (counts.right_confidence / counts.right + counts.wrong_confidence / counts.wrong) / 2
