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
    top = np.empty((num_rows, k), dtype=np.int32)
    lines = vocab // NUM_BLOCKS
    if lines < 4 or k > NUM_BLOCKS // 4:
        for i in range(num_rows):
            top[i] = np.argsort(-logits[i], kind="stable")[:k]
        return top
    folded = lines * NUM_BLOCKS
    for i in range(num_rows):
        row = logits[i]
        blocks = row[:folded].reshape(lines, NUM_BLOCKS)
        maxima = blocks.max(axis=0)
        # k values are at least as large, so nothing below it is among the top k.
        threshold = np.partition(maxima, NUM_BLOCKS - k)[NUM_BLOCKS - k]
        chosen = (maxima >= threshold).nonzero()[0]
        candidates = blocks.take(chosen, axis=1).ravel()  # [lines * chosen], ids ascending
        found = (candidates >= threshold).nonzero()[0]
        values = candidates[found]
        line, column = np.divmod(found, len(chosen))
        ids = line * NUM_BLOCKS + chosen[column]
        if folded < vocab:
            tail = (row[folded:] >= threshold).nonzero()[0] + folded
            if len(tail):
                ids = np.concatenate((ids, tail))
                values = np.concatenate((values, row[tail]))
        top[i] = ids[np.argsort(-values, kind="stable")[:k]]
    return top
