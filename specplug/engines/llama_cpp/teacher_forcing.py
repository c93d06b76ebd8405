"""Teacher forcing: a model's logits after every token of a given text, in few passes.

Works on one context, and does not depend on what the logits are used for.
"""

from __future__ import annotations

from collections.abc import Iterator

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context, Logits

ROWS = 64
"""The most rows with logits in one pass; for a vocabulary of 262 thousand tokens they take 67 MB."""


def teacher_forced_logits(context: Context, text: IntArray, first: int) -> Iterator[Logits]:
    """float32[n, V] per pass: the logits after text[first], text[first + 1], ...; views that the next pass overwrites.

    The context must allow ROWS rows with logits, and is emptied first.
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
