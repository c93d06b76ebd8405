"""Which parts of a text a drafter with a short context keeps, worked out by hand and on made-up texts."""

from itertools import pairwise
from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.core import int_array
from specplug.drafts.retrieval import QUERY_TOKENS, Retrieval, Window, bm25, last_turn

START, END = 900, 901


def is_control(token: int) -> bool:
    return token >= START


def test_scores_are_those_of_the_formula() -> None:
    """Three chunks of 4, 2 and 3 tokens: the mean is 3. k1 is 1.5 and b 0.75, as usual."""
    chunks = [int_array([1, 1, 2, 3]), int_array([2, 4]), int_array([5, 5, 5])]

    def term(count: int, length: int, holders: int) -> float:
        return log(1 + (3 - holders + 0.5) / (holders + 0.5)) * count / (count + 1.5 * (0.25 + 0.75 * length / 3))

    scores = bm25(chunks, int_array([1, 2, 2, 7]))
    assert scores.tolist() == pytest.approx([term(2, 4, 1) + 2 * term(1, 4, 2), 2 * term(1, 2, 2), 0.0])
    assert bm25(chunks, int_array([])).tolist() == [0.0, 0.0, 0.0]


@given(st.integers(0, 19), st.integers(0, 2**32 - 1))
def test_the_chunk_with_the_needle_is_chosen(place: int, seed: int) -> None:
    """Twenty chunks of common tokens, of which one has the four rare tokens of the question."""
    random = np.random.default_rng(seed)
    window = Window(16, 64, 32, 32)
    text = random.integers(0, 5, 16 + 20 * 32 + 64)
    needle = np.arange(100, 104)
    text[16 + place * 32 + 5 : 16 + place * 32 + 9] = needle
    text[-20:-16] = needle
    retrieval = Retrieval(window, is_control)
    retrieval.start(int_array(text))
    assert retrieval.spans(text.tolist()) == [(0, 16), (16 + place * 32, 48 + place * 32), (656, 720)]


def test_parts_do_not_overlap_and_the_last_chunk_ends_where_the_recent_tokens_begin() -> None:
    window = Window(10, 32, 32, 16)
    text = list(range(10 + 20 + 32 + 16))  # chunks begin at 10 and 26; the second one ends at 42, the third at 46
    retrieval = Retrieval(window)
    retrieval.start(int_array([*text[:42], *text[42:46], *text[42:]]))
    assert retrieval.spans(text[:74]) == [(0, 74)]
    spans = retrieval.spans(text)
    assert spans[0] == (0, 10) and spans[-1] == (46, 78)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    assert {stop - start for start, stop in spans[1:-1]} <= {16, 4}


def test_chunks_are_kept_until_they_are_chosen_again_by_what_was_written() -> None:
    """The question is chosen, too, once it is no longer among the recent tokens."""
    window = Window(16, 32, 64, 32)
    middle = [token for chunk in range(4) for token in [100 + chunk] * 32]
    prompt = [*range(16), *middle, *[7] * 29, 101, 101, 101]
    retrieval = Retrieval(window)
    retrieval.start(int_array(prompt))
    assert (48, 80) in retrieval.spans(prompt)
    text = prompt + [103] * 20
    assert retrieval.spans(text) == [*retrieval.spans(prompt)[:-1], (len(text) - 32, len(text))]
    assert retrieval.choose_again(text)
    assert retrieval.spans(text) == [(0, 16), (112, 144), (144, 164), (164, 196)]
    assert not retrieval.choose_again(text)


def test_the_query_is_the_last_turn() -> None:
    history = [*range(300), END]
    question = list(range(500, 520))
    prompt = int_array([*history, START, *question, END, 10, START, 11, 10, 12])
    assert last_turn(prompt, is_control).tolist() == question
    long = int_array([*history, START, *range(400), END, 10, START, 11, 10, 12])
    assert last_turn(long, is_control).tolist() == list(range(400))[-QUERY_TOKENS:]
    raw = int_array(list(range(400)))
    assert last_turn(raw, is_control).tolist() == list(range(400))[-QUERY_TOKENS:]
    assert last_turn(int_array([START, 3]), is_control).tolist() == [START, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 64}, "context needs the keys first and recent"),
        ({"first": 64, "recent": 512, "last": 3}, "context needs the keys first and recent"),
        ({"first": 0, "recent": 512}, "at least 1 first and 32 recent"),
        ({"first": 1, "recent": 31}, "at least 1 first and 32 recent"),
        ({"first": 1, "recent": 32, "retrieved": 100}, "retrieved is 100; use a multiple of chunk, which is 256"),
        ({"first": 1, "recent": 32, "retrieved": -256}, "retrieved is -256; use a multiple"),
        ({"first": 1, "recent": 32, "retrieved": 64, "chunk": 8}, "chunk is 8; use at least 16"),
    ],
)
def test_bad_windows_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Window.of(options)


def test_a_window_without_chunks_keeps_its_old_form() -> None:
    assert Window.of({"first": 64, "recent": 512}) == Window(64, 512)
    assert Window.of({"first": 64, "recent": 512, "retrieved": 2048}).size == 64 + 512 + 2048
