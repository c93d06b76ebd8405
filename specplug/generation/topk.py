"""The most likely ids of each row of logits.

Knows arrays. Knows no engine, no sampler and no vocabulary.
Source: our own. The k blocks with the largest maxima hold the k largest values, so only those are searched. A block is
a column of the row folded into lines of NUM_BLOCKS, so that the maxima of all blocks are taken by vector instructions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray

NUM_BLOCKS = 1024
"""More blocks leave less to search and cost more to rank."""


def top_ids(logits: npt.NDArray[np.float32], k: int) -> IntArray:
    """int32[rows, k]: the ids of the k largest logits of each row, largest first; ties in favour of the lower id.

    logits float32[rows, V] without NaN; V >= k >= 1. A view of the engine's buffer will do: nothing is written to it.
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
    # k values are at least as large, so nothing below it is among the top k.
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
