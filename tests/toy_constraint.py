"""Constraints over token ids for tests, without a grammar or a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from specplug.core import TokenConstraint
from specplug.testing import ToyTarget

LONGEST = 50
"""Most tokens that are forced at once, so that a loop has an end."""


class Toy:
    """Allows the tokens that `following` returns after the tokens so far."""

    def __init__(
        self,
        following: Callable[[Sequence[int]], Collection[int]],
        text: Sequence[int] = (),
        style: Callable[[Sequence[int]], TokenConstraint | None] = lambda text: None,
    ) -> None:
        """`style` returns the style that goes on as the tokens so far."""
        self.following = following
        self.text = list(text)
        self._style = style

    def allowed(self, tokens: Sequence[int]) -> int:
        for count, token in enumerate(tokens):
            if token not in self.following([*self.text, *tokens[:count]]):
                return count
        return len(tokens)

    def forced(self) -> Sequence[int]:
        found: list[int] = []
        while len(found) < LONGEST and len(choice := self.following([*self.text, *found])) == 1:
            found += choice
        return found

    def advance(self, tokens: Sequence[int]) -> None:
        if self.allowed(tokens) < len(tokens):
            raise ValueError(f"{tokens} is not allowed after {self.text}")
        self.text += tokens

    def go_back(self, count: int) -> None:
        assert count <= len(self.text)
        del self.text[len(self.text) - count :]

    def style(self) -> TokenConstraint | None:
        return self._style(self.text)


def by_place(choices: Sequence[Collection[int]]) -> Toy:
    """Allows the tokens of `choices[0]`, then those of `choices[1]`, and nothing after the last one."""
    return Toy(lambda text: choices[len(text)] if len(text) < len(choices) else ())


def of_target(target: ToyTarget, prompt: Sequence[int]) -> Toy:
    """Allows the target's plausible tokens, and after an even one no other than the most likely token."""

    def following(text: Sequence[int]) -> Collection[int]:
        likeliest = target.topk(text, target.branches).tolist()
        return likeliest if text and text[-1] % 2 else likeliest[:1]

    return Toy(following, prompt)
