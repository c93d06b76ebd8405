"""Which parts of a long text a drafter with a short context keeps: the first, the recent and retrieved tokens.

Works on token ids, and does not depend on a model, a tokenizer or an engine.
Source: first and recent tokens, StreamingLLM (arXiv 2309.17453); a drafter that reads retrieved chunks, RAPID (arXiv
2502.20330). RAPID ranks chunks by text embeddings, once; this ranks them by BM25 over token ids, with Lucene's inverse
document frequency, and can rank them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specplug.core import FloatArray, IntArray, int_array

Span = tuple[int, int]
"""The places [start, stop) of a text."""

CHUNK = 256
"""Default size of a chunk, tokens."""

SMALLEST_RECENT = 32
"""Fewest recent tokens of a window."""

SMALLEST_CHUNK = 16
"""Fewest tokens of a chunk."""

QUERY_TOKENS = 160
"""Most tokens of the prompt, and as many of the answer, that are looked for. Chosen."""

FEWEST_TURN_TOKENS = 4
"""A stretch between two control tokens with fewer tokens than this names a role and is no turn, such as `assistant` and
a line break."""

SATURATION, LENGTH_SHARE = 1.5, 0.75
"""k1 and b of BM25: the usual values."""


@dataclass(frozen=True, slots=True)
class Window:
    """The tokens of a text that a drafter keeps. A text that is no longer than `size` is kept whole.

    first      tokens at the beginning
    recent     tokens at the end; more of them as long as the others leave room
    retrieved  tokens of chunks between them, at most
    chunk      tokens of a chunk
    """

    first: int
    recent: int
    retrieved: int = 0
    chunk: int = CHUNK

    @property
    def size(self) -> int:
        return self.first + self.recent + self.retrieved

    def check(self) -> None:
        """Raise ValueError for values out of range."""
        if self.first < 1 or self.recent < SMALLEST_RECENT:
            raise ValueError(
                f"first is {self.first}, recent {self.recent}; use at least 1 first and {SMALLEST_RECENT} recent tokens"
            )
        if self.chunk < SMALLEST_CHUNK:
            raise ValueError(f"chunk is {self.chunk}; use at least {SMALLEST_CHUNK} tokens")
        if self.retrieved < 0 or self.retrieved % self.chunk:
            raise ValueError(f"retrieved is {self.retrieved}; use a multiple of chunk, which is {self.chunk}, or 0")

    @classmethod
    def of(cls, options: Mapping[str, int]) -> Window:
        """The window of the option `context`. Raises ValueError for unknown or missing keys and values out of range."""
        if not {"first", "recent"} <= set(options) <= {"first", "recent", "retrieved", "chunk"}:
            raise ValueError(
                "context needs the keys first and recent, such as {first: 64, recent: 512}, and may have retrieved and "
                "chunk"
            )
        window = cls(**options)
        window.check()
        return window


class Retrieval:
    """Chooses the chunks of one text at a time.

    State: the chunks chosen for the text, and the tokens of the prompt that are looked for.
    Cost: one pass of NumPy over the text where chunks are chosen, and nothing between.
    """

    def __init__(self, window: Window, is_control: Callable[[int], bool] = lambda token: False) -> None:
        """`is_control` tells the tokens that separate the turns of a conversation."""
        self.window = window
        self._is_control = is_control
        self._query: IntArray = int_array([])
        self._num_prompt = 0
        self._chunks: list[Span] | None = None

    def start(self, prompt: IntArray) -> None:
        """Begin a text, whose chunks are not chosen yet."""
        # Not more than the recent part has, since chunks would match their own tokens.
        self._query = last_turn(prompt, self._is_control)[-self.window.recent :]
        self._num_prompt = len(prompt)
        self._chunks = None

    def spans(self, text: Sequence[int]) -> list[Span]:
        """The parts of a text to keep, in order; the last one has the recent tokens, and may be all of it."""
        window, end = self.window, len(text)
        if end <= window.size:
            return [(0, end)]
        if self._chunks is None:
            self._chunks = self._chosen(text)
        recent = end - window.recent  # a text may be cut by a token after the choice
        chunks = [(start, min(stop, recent)) for start, stop in self._chunks if start < recent]
        return [(0, window.first), *chunks, (recent, end)]

    def choose_again(self, text: Sequence[int]) -> bool:
        """Choose the chunks again, by what was written since; whether other ones were chosen."""
        if len(text) <= self.window.size:
            return False
        before = self._chunks
        self._chunks = self._chosen(text)
        return self._chunks != before

    def _chosen(self, text: Sequence[int]) -> list[Span]:
        window = self.window
        stop = len(text) - window.recent
        count = window.retrieved // window.chunk
        if not count:
            return []
        spans = [(at, min(at + window.chunk, stop)) for at in range(window.first, stop, window.chunk)]
        written = text[max(self._num_prompt, len(text) - min(QUERY_TOKENS, window.recent)) :]
        query = np.concatenate((self._query, int_array(written)))
        scores = bm25([int_array(text[start:end]) for start, end in spans], query)
        return [spans[place] for place in sorted(np.argsort(-scores, kind="stable")[:count].tolist())]


def bm25(chunks: Sequence[IntArray], query: IntArray) -> FloatArray:
    """float64[chunks]: how well each chunk (int32[n], n >= 1) matches the tokens of a query.

    A token that the query has twice counts twice.
    """
    terms, weights = np.unique(query, return_counts=True)
    lengths = np.array([len(chunk) for chunk in chunks])
    tokens = np.concatenate(chunks)
    places = np.searchsorted(terms, tokens)
    places[places == len(terms)] = 0
    found = terms[places] == tokens if len(terms) else np.zeros(len(tokens), dtype=bool)
    rows = np.repeat(np.arange(len(chunks)), lengths)[found]
    shape = len(chunks), len(terms)
    counts = np.bincount(rows * len(terms) + places[found], minlength=shape[0] * shape[1]).reshape(shape)
    holders = (counts > 0).sum(axis=0)
    rarity = np.log1p((len(chunks) - holders + 0.5) / (holders + 0.5))
    long = 1 - LENGTH_SHARE + LENGTH_SHARE * lengths / lengths.mean()
    scores: FloatArray = counts / (counts + SATURATION * long[:, None]) @ (rarity * weights)
    return scores


def last_turn(prompt: IntArray, is_control: Callable[[int], bool]) -> IntArray:
    """The end of the last turn of a prompt (int32[n]), at most QUERY_TOKENS tokens.

    A turn ends at a control token. Without one, and in a turn that is longer, it is the last tokens.
    """
    stop = len(prompt)
    for at in range(len(prompt) - 1, -1, -1):
        if stop - at > QUERY_TOKENS:
            break
        if is_control(int(prompt[at])):
            if stop - at > FEWEST_TURN_TOKENS:
                return prompt[at + 1 : stop]
            stop = at
    return prompt[max(0, stop - QUERY_TOKENS) : stop] if stop else prompt[-QUERY_TOKENS:]
