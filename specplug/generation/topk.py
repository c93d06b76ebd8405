"""The most likely ids of each row of logits.

Source: our own. The k blocks with the largest maxima contain the k largest values, so only these blocks are searched. A
row is folded into lines of NUM_BLOCKS values and a block is one column of them, so that vector instructions find the
maxima of all blocks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray

NUM_BLOCKS = 1024
"""Blocks per row. With more blocks there is less to search and more to rank. Chosen, not measured."""


def top_ids(logits: npt.NDArray[np.float32], k: int) -> IntArray:
    """int32[rows, k]: the ids of the k largest logits of each row, largest first; of equal ones the lower id first.

    logits  float32[rows, V] without NaN, V >= k >= 1; nothing is written to it, so it may be the engine's own buffer
    """
    num_rows, vocab = logits.shape
    assert 1 <= k <= vocab, f"the top {k} of {vocab} ids"
    lines = vocab // NUM_BLOCKS
    if lines < 4 or k > NUM_BLOCKS // 4:
        best: IntArray = np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)
        return best
    folded = lines * NUM_BLOCKS
    blocks = logits[:, :folded].reshape(num_rows, lines, NUM_BLOCKS)
    maxima = blocks.max(axis=1)
    # At least k values reach the threshold, so no value below it is among the k largest.
    threshold = np.partition(maxima, NUM_BLOCKS - k, axis=1)[:, NUM_BLOCKS - k]
    row, block = (maxima >= threshold[:, None]).nonzero()
    candidates = blocks[row, :, block]  # [chosen blocks, lines]
    chosen, line = (candidates >= threshold[row, None]).nonzero()
    rows, ids, values = row[chosen], line * NUM_BLOCKS + block[chosen], candidates[chosen, line]
    if folded < vocab:
        row, place = (logits[:, folded:] >= threshold[:, None]).nonzero()
        rows = np.concatenate((rows, row))
        ids = np.concatenate((ids, place + folded))
        values = np.concatenate((values, logits[row, place + folded]))
    order = np.lexsort((ids, -values, rows))
    first = np.searchsorted(rows[order], np.arange(num_rows))
    top: IntArray = ids[order][first[:, None] + np.arange(k)].astype(np.int32)
    return top
