"""For how many tokens of a text a drafter pauses, because too few of its draft tokens were right.

A first draft token saves time only if the share of right ones is above its price: the time of a draft token over that
of a pass that verifies it. The module knows counts and prices only, and reads no clock, so that all ranks decide alike.
State: per text four numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_TESTED = 64
"""Draft tokens by which a share is judged, at least. Chosen."""

FIRST_PAUSE = 256
"""Tokens of a text that the first pause lasts. Chosen."""

LONGEST_PAUSE = 4096
"""Tokens to which the pause grows: it doubles with each one that follows another. Chosen."""


@dataclass(slots=True)
class DraftPause:
    """Of one text. After a pause the drafter is tried again.

    until         tokens of the text up to which nothing is drafted; None where it drafts
    length        tokens that the next pause lasts
    right, wrong  draft tokens up to the latest decision
    """

    until: int | None = None
    length: int = FIRST_PAUSE
    right: int = 0
    wrong: int = 0

    def learn(self, num_tokens: int, right: int, wrong: int, price: float) -> None:
        """Decide by all draft tokens of the text so far.

        num_tokens  of the text
        right       draft tokens that the target agreed with
        wrong       those it did not agree with; what follows such a token is not counted
        price       of a draft token, in passes of the target; with 0 every drafter pays
        """
        tested = right - self.right + wrong - self.wrong
        if self.until is not None:
            if num_tokens < self.until:
                return
            self.until = None
        elif tested < LEAST_TESTED:
            return
        elif right - self.right < price * tested:
            self.until = num_tokens + self.length
            self.length = min(2 * self.length, LONGEST_PAUSE)
        else:
            self.length = FIRST_PAUSE
        self.right, self.wrong = right, wrong


def price_of(row_bytes: float, text_bytes: float, weight_bytes: float) -> float:
    """What a draft token costs in passes of the target: the bytes that the one reads over those that the other does.

    row_bytes     the keys and values of what is kept of the text
    text_bytes    those of the complete text
    weight_bytes  the text's share of the weights, which a batch reads once
    """
    return (row_bytes + weight_bytes) / (text_bytes + weight_bytes)
