"""A drafter's logits after the tokens of a given text.

Works on a context and the cells of one sequence id, and drafts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specplug.core import IntArray, int_array
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.drafters.slot_cells import SlotCells


def read(context: Context, cells: SlotCells, seq_id: int, text: Sequence[int]) -> None:
    """Read the tokens of a text before its last one."""
    while cells.read < len(text) - 1:
        piece = cells.prepare(text, context.num_batch, with_last=False)
        context.clear_batch()
        context.add_span(piece, cells.next_position, seq_id, wanted=False, last=True)
        context.decode()
        cells.append(piece, of_text=True)


def logits_of(context: Context, cells: SlotCells, seq_id: int, tokens: Sequence[int], rows: int) -> Iterator[Logits]:
    """float32[rows of the head] after each of the next tokens of a text; each is overwritten by later passes.

    rows  tokens of one pass at most
    """
    for at in range(0, len(tokens), rows):
        part = tokens[at : at + rows]
        context.clear_batch()
        context.add_span(part, cells.next_position, seq_id, wanted=True)
        context.decode()
        cells.append(part, of_text=True)
        yield from context.logits(len(part))


def likeliest_at_end(context: Context, seq_id: int, text: Sequence[int], count: int) -> IntArray:
    """int32[count]: the likeliest row of the head before each of the last `count` tokens of a short text, in one pass.

    seq_id  has no cells afterwards
    """
    before = len(text) - 1 - count
    context.drop(seq_id)  # what an interrupted pass may have left
    context.clear_batch()
    context.add_span(text[:before], 0, seq_id, wanted=False)
    context.add_span(text[before:-1], before, seq_id, wanted=True)
    context.decode()
    best = int_array(context.logits(count).argmax(axis=1))
    context.drop(seq_id)
    return best
