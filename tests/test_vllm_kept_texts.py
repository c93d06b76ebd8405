"""Which texts the drafter with a short context on vLLM keeps parts of, and which parts."""

import numpy as np
import pytest

from specplug.drafts.retrieval import Window
from specplug.engines.vllm.v2.draft_pause import FIRST_PAUSE, LEAST_TESTED, LONGEST_PAUSE, DraftPause, price_of
from specplug.engines.vllm.v2.kept_texts import EMPTY, LEAST_EMITTED, MOST_EMITTED, Choice, KeptTexts


def free(num_tokens: int) -> float:
    """A draft token costs nothing, so every drafter pays."""
    return 0.0


WINDOW = Window(first=4, recent=32, retrieved=32, chunk=16)


def kept_of(choice: Choice) -> set[int]:
    """The positions that a row has: the chosen ones, and the recent tokens of a text of 200 tokens."""
    assert choice.positions.dtype == np.int32 and len(choice.positions) == WINDOW.first + WINDOW.retrieved
    chosen = choice.positions[choice.positions != EMPTY].tolist()
    assert chosen == sorted(set(chosen)) and max(chosen) < choice.least
    return {*chosen, *range(choice.least, 200)}


def text_about(topic: int, *, size: int = 200) -> list[int]:
    """Tokens that occur once, but for the last eight, which also stand in the chunk that begins at 4 + 16 * topic."""
    text = list(range(1000, 1000 + size))
    text[-8:] = text[8 + 16 * topic : 16 + 16 * topic]
    return text


def test_the_first_the_recent_and_the_matching_tokens_are_kept() -> None:
    texts = KeptTexts(WINDOW, rows=2)
    texts.begin(7, text_about(5))
    assert texts.start([]) == [] and texts.row_of(7) is None, "its prompt has not been read"
    (choice,) = texts.start([7])
    assert (choice.row, choice.slot, choice.least) == (0, 7, 168)
    kept = kept_of(choice)
    assert set(range(4)) | set(range(84, 100)) | set(range(168, 200)) <= kept and len(kept) == WINDOW.size
    assert texts.start([7]) == [] and texts.rows() == {0: 7}
    assert (texts.first_choices, texts.repeated_choices) == (1, 0)


def test_texts_that_the_window_holds_and_those_beyond_the_rows_have_none() -> None:
    texts = KeptTexts(WINDOW, rows=2)
    sizes = {3: WINDOW.size, 4: WINDOW.size + 1, 5: 200, 6: 200, 9: 200}
    for slot, size in sizes.items():
        texts.begin(slot, text_about(1, size=size))
    assert [one.slot for one in texts.start(sizes)] == [4, 5]
    assert texts.row_of(3) is texts.row_of(6) is None
    texts.end(4)
    assert [(one.slot, one.row) for one in texts.start([6, 9])] == [(6, 0)], "in the order in which they began"
    texts.begin(6, text_about(1))
    assert texts.row_of(6) is None and [one.row for one in texts.start([6])] == [0], "the text before has left its row"
    for slot in (5, 6, 9, 3):
        texts.end(slot)
    texts.begin(5, text_about(1))
    assert [(one.slot, one.row) for one in texts.start([5])] == [(5, 0)] and len(texts.rows()) == 1


def test_other_parts_are_chosen_where_few_draft_tokens_are_right() -> None:
    texts = KeptTexts(WINDOW, rows=1)
    prompt = text_about(5)
    texts.begin(0, prompt)
    texts.start([0])
    about = prompt[116:132] * 4
    assert texts.learn(0, about[:-1], 0, 60, free) is None, "not after so few tokens"
    choice = texts.learn(0, about[-1:], 0, 60, free)
    assert choice is not None and len(about) == LEAST_EMITTED
    assert choice.least == 200 + LEAST_EMITTED - WINDOW.recent
    assert set(range(116, 132)) <= set(choice.positions.tolist())
    assert texts.repeated_choices == 1 and texts.known(0) == 264
    assert texts.learn(0, about, 160, 80, free) is None, "100 of 120 since then were right"
    assert texts.repeated_choices == 1


def test_the_same_choice_makes_the_next_one_wait_longer() -> None:
    texts = KeptTexts(WINDOW, rows=1)
    prompt = text_about(5)
    texts.begin(0, prompt)
    texts.start([0])
    wrong, emitted, looks = 0, 0, []
    for _ in range(3 * MOST_EMITTED):
        wrong, emitted = wrong + 1, emitted + 1
        before = texts.repeated_choices
        texts.learn(0, [prompt[88 + emitted % 8]], 0, wrong, free)
        if texts.repeated_choices > before:
            looks.append(emitted)
    waits = np.diff([0, *looks]).tolist()
    assert waits[-1] == MOST_EMITTED and waits == sorted(waits) and len(waits) >= 5


def test_a_text_whose_draft_tokens_do_not_pay_pauses_ever_longer_and_is_tried_again() -> None:
    texts = KeptTexts(WINDOW, rows=1)
    texts.begin(0, text_about(5))
    texts.start([0])
    half = {"price": lambda num_tokens: 0.5}
    wrong, pauses, since = 0, [], None
    while len(pauses) < 7:
        before = texts.is_paused(0)
        wrong += 0 if before else 1
        texts.learn(0, [7], 0, wrong, **half)
        if texts.is_paused(0) and not before:
            assert wrong == LEAST_TESTED * (len(pauses) + 1)
            since = texts.known(0)
        elif before and not texts.is_paused(0):
            assert since is not None
            pauses.append(texts.known(0) - since)
    assert pauses == [FIRST_PAUSE, 512, 1024, 2048, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_a_text_pauses_only_below_the_price_and_forgets_what_came_before() -> None:
    pause = DraftPause()
    pause.learn(100, 32, 32, 0.5)
    assert pause.until is None, "as many were right as have to be"
    pause.learn(200, 32 + 31, 32 + 32, 0.5)
    assert pause.until is None, "63 tokens since the decision"
    pause.learn(200, 32 + 31, 32 + 33, 0.5)
    assert pause.until == 200 + FIRST_PAUSE
    pause.learn(200 + FIRST_PAUSE, 63, 65, 0.5)
    assert pause.until is None and pause.length == 2 * FIRST_PAUSE
    pause.learn(600, 63 + 64, 65, 0.5)
    assert pause.until is None and pause.length == FIRST_PAUSE, "a trial that pays makes the next pause short"


def test_a_draft_token_is_cheap_where_much_is_left_out_and_the_weights_are_shared() -> None:
    assert price_of(1, 10, 0) == pytest.approx(0.1)
    assert price_of(1, 10, 100) == pytest.approx(101 / 110)
    assert price_of(1, 10, 100) > price_of(1, 10, 100 / 16)
