"""Follows a growing text through a shard: where its longest end occurs.

After a token, the suffixes that matched are narrowed to those that continue with it. Only where none does, shorter ends
are searched for. State: 32 tokens per text, and four numbers per text and shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from specplug.corpora.shard import Interval, Shard, encoded

LONGEST = 32
"""Tokens of the longest end that is searched for. A match that is followed may become longer."""


@dataclass(slots=True)
class _Place:
    """Where the latest end of a text occurs in one shard.

    length    tokens that match; below the least match where none does
    interval  of the suffixes that start with them
    known     tokens of the text that were followed
    """

    length: int
    interval: Interval
    known: int


@dataclass(slots=True)
class Text:
    """The end of one running text.

    num_tokens  size of the vocabulary; a token outside of it, which stands for an image, matches nothing
    tail        the last tokens
    length      tokens of the complete text
    places      by number of the shard
    """

    num_tokens: int
    tail: deque[int] = field(default_factory=lambda: deque(maxlen=LONGEST))
    length: int = 0
    places: dict[int, _Place] = field(default_factory=dict)

    def append(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.length += 1
            if 0 <= token < self.num_tokens:
                self.tail.append(token)
            else:
                self.tail.clear()

    def use_shards(self, numbers: Collection[int], num_tokens: int) -> None:
        """Search in these shards alone from now on, with a vocabulary of `num_tokens`."""
        self.num_tokens = num_tokens
        self.places = {number: place for number, place in self.places.items() if number in numbers}
        tail = list(self.tail)
        outside = [at for at, token in enumerate(tail) if token >= num_tokens]
        if outside:
            self.tail.clear()
            self.tail.extend(tail[outside[-1] + 1 :])


def longest_match(text: Text, shard: Shard, least: int) -> tuple[int, Interval]:
    """The length of the longest end of the text that occurs in the shard, and the suffixes that start with it.

    least  the shortest end that counts; the length is 0 where not even that occurs
    """
    tail = list(text.tail)
    place = text.places.get(shard.number)
    new = LONGEST + 1 if place is None else text.length - place.known
    if place is None or new > len(tail):
        place = text.places[shard.number] = _Place(0, (0, 0), text.length)
        length, interval = _searched(tail, shard, least, len(tail))
    else:
        length, interval = place.length, place.interval
        for left in range(new, 0, -1):
            token = tail[-left]
            found = shard.narrowed(interval, length, encoded([token], shard.how)) if length else (0, 0)
            if found[0] < found[1]:
                length, interval = length + 1, found
            else:
                # A longer end than before cannot occur: without its last token it would have matched then.
                end = tail[: len(tail) - left + 1]
                length, interval = _searched(end, shard, least, min(len(end), max(length, least)))
    place.length, place.interval, place.known = length, interval, text.length
    return length, interval


def _searched(tail: list[int], shard: Shard, least: int, most: int) -> tuple[int, Interval]:
    """The longest end of `tail` of `least` to `most` tokens that occurs. It is bisected: shorter ends occur, too."""
    data, width = encoded(tail, shard.how), shard.how.num_bytes
    length, interval = 0, (0, 0)
    low, high = least, most
    while low <= high:
        middle = min(high, 2 * low) if not length else (low + high + 1) // 2
        found = shard.find(data[len(data) - middle * width :], tail[-middle])
        if found[0] < found[1]:
            length, interval, low = middle, found, middle + 1
        else:
            high = middle - 1
    return length, interval
