"""Tokens' bytes to text that can be shown: whole characters only, nothing past a stop string.

Knows bytes and strings. Knows no tokenizer.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Segment:
    """Text to show, whether an accepted draft token brought it, and which proposer guessed that one, where known."""

    text: str
    drafted: bool
    source: int | None = None


class TextStream:
    """Feeds on one token's bytes at a time; releases text as soon as nothing later can take it back.

    A character split over tokens is released with its last byte; text that may begin a stop string is held until it
    is known not to. Bytes that never become UTF-8 are shown as U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = [s for s in stop if s]
        self._held: list[Segment] = []
        self.stopped = False
        """True once a stop string came; what follows is ignored."""

    def feed(self, data: bytes, drafted: bool, source: int | None = None) -> list[Segment]:
        """Text released by one more token."""
        if self.stopped:
            return []
        text = self._decoder.decode(data)
        if text:
            self._held.append(Segment(text, drafted, source))
        return self._release(final=False)

    def close(self) -> list[Segment]:
        """What is left at the end."""
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
        # The first to be complete, as if the text came character by character.
        found = [(text.find(s) + len(s), text.find(s)) for s in self._stop if s in text]
        if found:
            self.stopped = True
            free, self._held = _cut(self._held, min(found)[1])[0], []
            return free
        keep = 0 if final else max(_overlap(text, s) for s in self._stop)
        free, self._held = _cut(self._held, len(text) - keep)
        return free


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


def _cut(segments: Sequence[Segment], at: int) -> tuple[list[Segment], list[Segment]]:
    """Segments before and after character `at` of their joined text."""
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
