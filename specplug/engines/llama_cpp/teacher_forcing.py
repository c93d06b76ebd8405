"""What a model would have said along a text that is given to it: the logits after every token, in few passes.

Knows one context. Knows nothing of what is read from the logits.
"""

from __future__ import annotations

from collections.abc import Iterator

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context, Logits

ROWS = 64
"""Rows with logits in one pass, at most: of a vocabulary of 262 thousand tokens they take 67 MB."""


def forced_logits(context: Context, text: IntArray, first: int) -> Iterator[Logits]:
    """float32[n, V] after text[first], text[first + 1], ..., in turn; each is a view that the next pass overwrites.

    The context is emptied first, and takes ROWS rows with logits.
    """
    context.clear()
    for start in range(0, first, context.num_batch):
        context.clear_batch()
        context.add_span(text[start : min(start + context.num_batch, first)], start, 0, wanted=False, last=True)
        context.decode()
    for start in range(first, len(text), ROWS):
        part = text[start : start + ROWS]
        context.clear_batch()
        context.add_span(part, start, 0, wanted=True)
        context.decode()
        yield context.logits(len(part))
