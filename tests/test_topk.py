"""The blockwise search must agree with sorting the complete row, including ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.generation.topk import NUM_BLOCKS, top_ids


def sorted_ids(logits: np.ndarray, k: int) -> np.ndarray:
    """By definition: largest first, of equal ones the lower id first."""
    return np.array([sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in logits.tolist()])


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 3),
    vocab=st.one_of(st.integers(1, 70), st.integers(4 * NUM_BLOCKS - 2, 4 * NUM_BLOCKS + 2), st.integers(5000, 9000)),
    k=st.one_of(st.integers(1, 16), st.integers(NUM_BLOCKS // 4 - 1, NUM_BLOCKS + 2)),
    levels=st.sampled_from([1, 2, 30, 10**6]),
)
def test_equals_a_full_sort(seed: int, rows: int, vocab: int, k: int, levels: int) -> None:
    """With few levels there are many ties; with one level all values are equal."""
    k = min(k, vocab)
    logits = np.random.default_rng(seed).integers(0, levels, (rows, vocab)).astype(np.float32)
    found = top_ids(logits, k)
    assert found.dtype == np.int32
    assert found.shape == (rows, k)
    assert found.tolist() == sorted_ids(logits, k).tolist()


@pytest.mark.parametrize("best", [0, 1, 1023, 1024, 49151, 49152, 49999])
def test_finds_a_single_peak_wherever_it_is(best: int) -> None:
    """At the edges of blocks, and in the rest that fills no complete line (50000 = 48 x 1024 + 848)."""
    logits = np.zeros((1, 50000), dtype=np.float32)
    logits[0, best] = 1.0
    others = [i for i in range(3) if i != best][:2]
    assert top_ids(logits, 3).tolist() == [[best, *others]]


def test_all_candidates_in_one_block() -> None:
    """A block is a column: these eight ids are in the same one, which has a single maximum."""
    logits = np.full((1, 16 * NUM_BLOCKS), -1.0, dtype=np.float32)
    ids = [7 + line * NUM_BLOCKS for line in range(8)]
    logits[0, ids] = np.arange(1, 9, dtype=np.float32)
    assert top_ids(logits, 8).tolist() == [ids[::-1]]


def test_forbidden_ids_come_last() -> None:
    """A grammar sets most logits to minus infinity."""
    logits = np.full((1, 8000), -np.inf, dtype=np.float32)
    logits[0, [7999, 4100, 12]] = [3.0, 1.0, 2.0]
    assert top_ids(logits, 5).tolist() == [[7999, 12, 4100, 0, 1]]


def test_a_strided_view_is_read_and_not_changed() -> None:
    logits = np.random.default_rng(3).normal(size=(4, 6000)).astype(np.float32)
    before = logits.copy()
    assert top_ids(logits[::2], 8).tolist() == sorted_ids(before[::2], 8).tolist()
    assert np.array_equal(logits, before)


def test_more_ids_than_the_vocabulary_has_fail_an_assertion() -> None:
    with pytest.raises(AssertionError, match="top 9 of 8"):
        top_ids(np.zeros((1, 8), dtype=np.float32), 9)
