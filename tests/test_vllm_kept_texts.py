"""Which texts the drafter with a short context on vLLM keeps parts of, and which parts."""

import numpy as np

from specplug.drafts.retrieval import Window
from specplug.engines.vllm.v2.kept_texts import EMPTY, LEAST_EMITTED, MOST_EMITTED, Choice, KeptTexts

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
    assert texts.learn(0, about[:-1], 0, 60) is None, "not after so few tokens"
    choice = texts.learn(0, about[-1:], 0, 60)
    assert choice is not None and len(about) == LEAST_EMITTED
    assert choice.least == 200 + LEAST_EMITTED - WINDOW.recent
    assert set(range(116, 132)) <= set(choice.positions.tolist())
    assert texts.repeated_choices == 1 and texts.known(0) == 264
    assert texts.learn(0, about, 160, 80) is None, "100 of 120 since then were right"
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
        texts.learn(0, [prompt[88 + emitted % 8]], 0, wrong)
        if texts.repeated_choices > before:
            looks.append(emitted)
    waits = np.diff([0, *looks]).tolist()
    assert waits[-1] == MOST_EMITTED and waits == sorted(waits) and len(waits) >= 5
