"""Turns the bytes of tokens into text that can be shown: complete characters, and nothing from a stop string on.

This module does not depend on a tokenizer.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Segment:
    """Text to show, whether it comes from an accepted draft token, and from which proposer, by index, if known."""

    text: str
    drafted: bool
    source: int | None = None


class TextStream:
    """Receives the bytes of one token at a time, and returns text as soon as no later token can change it.

    A character that is split over tokens is returned with its last byte. Text that may be the beginning of a stop
    string is held back until that is decided. Bytes that are not valid UTF-8 are shown as U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = [s for s in stop if s]
        self._held: list[Segment] = []
        self.stop_string: str | None = None
        """The first stop string in the text, from which on tokens are ignored; None as long as there is none."""

    @property
    def stopped(self) -> bool:
        return self.stop_string is not None

    def feed(self, data: bytes, drafted: bool, source: int | None = None) -> list[Segment]:
        """The text that can be shown after one more token."""
        if self.stopped:
            return []
        text = self._decoder.decode(data)
        if text:
            self._held.append(Segment(text, drafted, source))
        return self._release(final=False)

    def close(self) -> list[Segment]:
        """The text that was still held back when generation ended."""
        if self.stopped:
            return []
        tail = self._decoder.decode(b"", final=True)
        if tail:
            self._held.append(Segment(tail, False))
        return self._release(final=True)

    def _release(self, *, final: bool) -> list[Segment]:
        if not self._stop:
            free, self._held = self._held, []
            return free
        text = "".join(segment.text for segment in self._held)
        # The first stop string to be complete counts, so that the text does not depend on how it is split into tokens.
        complete = [(text.find(s) + len(s), text.find(s), s) for s in self._stop if s in text]
        if complete:
            _, at, self.stop_string = min(complete)
            free, self._held = _cut(self._held, at)[0], []
            return free
        keep = 0 if final else max(overlap(text, s) for s in self._stop)
        free, self._held = _cut(self._held, len(text) - keep)
        return free


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


def _cut(segments: Sequence[Segment], at: int) -> tuple[list[Segment], list[Segment]]:
    """The segments before and after character `at` of their joined text."""
    before: list[Segment] = []
    after: list[Segment] = []
    for segment in segments:
        left, right = segment.text[: max(at, 0)], segment.text[max(at, 0) :]
        if left:
            before.append(replace(segment, text=left))
        if right:
            after.append(replace(segment, text=right))
        at -= len(segment.text)
    return before, after
