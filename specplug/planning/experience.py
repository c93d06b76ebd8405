"""What a drafter saved in earlier texts, and how long their answers were, by kind of text.

Works on tokens and shares of time, and does not depend on a proposer, on costs or on an engine.
Source: our own.
State: per kind of text one mean and some answer lengths; at most MOST_KINDS of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from math import isfinite
from typing import Any

from specplug.core import IntArray
from specplug.drafts.chains import num_agreeing
from specplug.planning.constants import (
    ANSWER_LENGTH,
    FEWEST_HEAD_TOKENS,
    KIND_TOKENS,
    MOST_HEAD_TOKENS,
    MOST_HEADS,
    MOST_KINDS,
    MOST_LENGTHS,
    MOST_SAVING_TOKENS,
    PRIOR_KINDS,
    SAVING_PRIOR_TOKENS,
)


@dataclass(slots=True)
class _Kind:
    """Texts of one kind.

    saving   share of the time of plain decoding that the drafter saved while it was asked; negative where it lost
    tokens   weight of `saving`: tokens emitted meanwhile
    lengths  tokens of the latest answers
    """

    saving: float = 0.0
    tokens: float = 0.0
    lengths: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Head:
    """Tokens with which several prompts begin, such as a chat template or a system prompt.

    common  False for the complete prompt that was seen first
    """

    tokens: list[int]
    common: bool = False


class Experience:
    """Texts are of one kind if their prompts have about the same length, and the same tokens at the first place where
    prompts differ at all, such as those of an instruction. A kind with few tokens is estimated by the others."""

    def __init__(self) -> None:
        self._heads: list[_Head] = []
        """The one used latest is last."""
        self._kinds: dict[str, _Kind] = {}
        self._lengths: list[int] = []
        """Tokens of the latest answers of all kinds."""

    def kind_of(self, prompt: IntArray) -> str:
        """The name of the kind of text that begins with this prompt. It contains no tokens, only a hash of some."""
        tokens = prompt[:MOST_HEAD_TOKENS].tolist()
        matches = [(num_agreeing(head.tokens, tokens), place) for place, head in enumerate(self._heads)]
        shared, place = max(matches, default=(0, 0))
        if shared and (
            shared >= min(FEWEST_HEAD_TOKENS, len(self._heads[place].tokens)) or not self._heads[place].common
        ):
            head = self._heads.pop(place)
            if shared < len(tokens):  # a prompt that is all head tells nothing about where prompts differ
                del head.tokens[shared:]
                head.common = True
        else:
            head = _Head(tokens)
            del self._heads[: max(0, len(self._heads) - MOST_HEADS + 1)]
        self._heads.append(head)
        own = prompt[len(head.tokens) : len(head.tokens) + KIND_TOKENS].astype("<i4").tobytes()
        length = 4 ** ((len(prompt).bit_length() - 1) // 2)
        return f"{blake2b(own, digest_size=6).hexdigest()}, {length} tokens or more"

    def saving(self, kind: str, prior: float) -> float:
        """The share of the time of plain decoding that drafting is expected to save in a text of this kind.

        prior  the share expected before anything was measured
        """
        weights, total = PRIOR_KINDS, PRIOR_KINDS * prior
        for other in self._kinds.values():
            weight = other.tokens / (other.tokens + SAVING_PRIOR_TOKENS)
            weights += weight
            total += weight * other.saving
        expected = total / weights
        own = self._kinds.get(kind)
        if own is None:
            return expected
        return expected + (own.saving - expected) * own.tokens / (own.tokens + SAVING_PRIOR_TOKENS)

    def knows(self, kind: str) -> bool:
        """Whether something was measured in texts of this kind."""
        own = self._kinds.get(kind)
        return own is not None and own.tokens > 0

    def learn_saving(self, kind: str, share: float, tokens: float) -> None:
        """Drafting saved a share of the time that plain decoding takes for so many tokens."""
        own = self._kind(kind)
        own.tokens += tokens
        own.saving += (share - own.saving) * tokens / own.tokens
        own.tokens = min(own.tokens, MOST_SAVING_TOKENS)

    def remaining(self, kind: str, emitted: int, most: int) -> float:
        """The number of tokens that an answer is expected to have after so many, at most `most`.

        As many as longer answers of its kind had, if there were any, else those of all kinds; else as many again.
        """
        own = self._kinds.get(kind)
        for lengths in (own.lengths if own is not None else [], self._lengths):
            more = [length - emitted for length in lengths if length > emitted]
            if more:
                break
        expected = (sum(more) + max(emitted, ANSWER_LENGTH)) / (len(more) + 1)
        return min(expected, float(most))

    def learn_length(self, kind: str, length: int) -> None:
        """An answer has ended after so many tokens."""
        for lengths in (self._kind(kind).lengths, self._lengths):
            lengths.append(length)
            del lengths[:-MOST_LENGTHS]

    def as_mapping(self) -> dict[str, Any]:
        """Plain data, for a file. It has no text: with which tokens prompts begin is learned anew from two prompts."""
        kinds = {name: asdict(kind) for name, kind in self._kinds.items()}
        return {"lengths": list(self._lengths), "kinds": kinds}

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Experience:
        """The inverse of `as_mapping`, but for the heads. Raises KeyError, TypeError or ValueError for other data."""
        experience = cls()
        experience._lengths = _checked_lengths(data["lengths"])
        for name, kind in list(data["kinds"].items())[-MOST_KINDS:]:
            saving, tokens = float(kind["saving"]), float(kind["tokens"])
            if not (isfinite(saving) and 0 <= tokens <= MOST_SAVING_TOKENS):
                raise ValueError(f"{saving} over {tokens} tokens")
            experience._kinds[str(name)] = _Kind(saving, tokens, _checked_lengths(kind["lengths"]))
        return experience

    def _kind(self, name: str) -> _Kind:
        """The kind, which becomes the latest one; the one that was not used for longest is forgotten."""
        kind = self._kinds.pop(name, None) or _Kind()
        if len(self._kinds) >= MOST_KINDS:
            del self._kinds[next(iter(self._kinds))]
        self._kinds[name] = kind
        return kind


def _checked_lengths(values: Sequence[object]) -> list[int]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("lengths are whole numbers")
    return [value for value in values if type(value) is int][-MOST_LENGTHS:]
