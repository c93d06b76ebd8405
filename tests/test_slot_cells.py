"""The cells of a drafter's slot, on a cache that only notes which token is at which position."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from specplug.core import int_array
from specplug.drafts.retrieval import Window
from specplug.engines.llama_cpp.drafters.slot_cells import SLACK, SlotCells

WINDOW = Window(4, 32, 32, 16)


class NotedCache:
    """One sequence: the token at each position."""

    def __init__(self) -> None:
        self.cells: dict[int, int] = {}

    def drop(self, seq: int, start: int = -1, stop: int = -1) -> None:
        start = max(start, 0)
        for position in [p for p in self.cells if p >= start and (stop < 0 or p < stop)]:
            del self.cells[position]

    def restore(self, seq: int, state: Any) -> None:
        assert not self.cells
        self.cells.update(state)


class Follower:
    """Does with the cells of a slot what a drafter does, and checks after each step that they are what they say."""

    def __init__(self, window: Window | None) -> None:
        self.cache = NotedCache()
        self.window = window
        self.cells = SlotCells(self.cache, 0, window)  # type: ignore[arg-type]
        self.text: list[int] = []

    def evaluate(self, tokens: list[int], *, of_text: bool) -> None:
        at = self.cells.next_position
        assert at == max(self.cache.cells, default=-1) + 1, "llama.cpp takes tokens at the next position only"
        self.cache.cells.update(enumerate(tokens, at))
        self.cells.append(tokens, of_text=of_text)
        self.check()

    def begin(self, prompt: list[int]) -> None:
        self.text = list(prompt)
        self.cells.start(int_array(prompt))

    def read(self, most: int) -> None:
        for _ in range(1000):
            if self.cells.num_unread(len(self.text)) <= 1 and self.cells.read == len(self.text):
                break
            piece = list(self.cells.prepare(self.text, most, with_last=True))
            assert 0 < len(piece) <= most
            self.evaluate(piece, of_text=True)
        assert self.cells.read == len(self.text)

    def copy(self) -> None:
        text = self.text[:-1]
        spans = self.cells.spans(text)
        state = {position: text[position] for start, stop in spans for position in range(start, stop)}
        self.cells.restore(text, spans, state)  # type: ignore[arg-type]
        self.check()
        assert self.cells.next_position == len(text) == self.cells.read
        assert self.cells.valid == len(self.cells.tokens) <= self.cells.num_kept(len(text))

    def draft(self, tokens: list[int]) -> None:
        if self.cells.read == len(self.text):
            self.cells.cut(self.cells.valid)
            self.evaluate(tokens, of_text=False)

    def emit(self, tokens: list[int]) -> None:
        for token in tokens:
            self.cells.emitted(token, len(self.text))
            self.text.append(token)

    def check(self) -> None:
        held = [self.cache.cells[position] for position in sorted(self.cache.cells)]
        assert held == self.cells.tokens
        if self.window is not None:
            assert len(held) <= self.window.size + self.window.recent + SLACK + 8


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["read", "copy", "draft", "emit", "begin", "again", "end"]),
        st.integers(1, 60),
        st.integers(0, 5),
    ),
    max_size=25,
)


@given(STEPS, st.sampled_from([None, WINDOW, Window(4, 32)]))
def test_cells_hold_the_tokens_that_they_say_whatever_happens(steps: Any, window: Window | None) -> None:
    one = Follower(window)
    one.begin(list(range(100)))
    for name, amount, value in steps:
        if name == "read":
            one.read(amount)
            whole = window is None or len(one.text) <= window.size
            tail = one.text if whole else one.text[-window.recent :]  # type: ignore[union-attr]
            assert one.cells.tokens[: one.cells.valid][-len(tail) :] == tail
        elif name == "copy":
            one.copy()
        elif name == "draft":
            one.draft([value] * (amount % 8 + 1))
        elif name == "emit":
            one.emit([value] * (amount % 40))
        elif name == "again":
            one.cells.choose_again(one.text[:-1])
        elif name == "end":
            one.cells.cut(one.cells.valid)
        else:
            one.begin([*one.text[: amount + 40], *[value] * (3 * amount)])
        one.check()


def test_a_long_text_is_read_as_first_chunks_and_recent_tokens() -> None:
    """The chunk that matches the end of the text lies between them; positions have no gap."""
    text = [*range(4), *[50] * 16, *[60] * 16, *[70] * 16, *[80] * 16, *[1] * 30, 70, 70]
    one = Follower(Window(4, 32, 16, 16))
    one.begin(text)
    assert one.cells.num_unread(len(text)) == 4 + 32 + 16
    one.read(10)
    assert one.cells.tokens == [*range(4), *[70] * 16, *[1] * 30, 70, 70]
    assert sorted(one.cache.cells) == list(range(52))
    one.emit([60] * 25)
    one.cells.choose_again(one.text[:-1])
    assert one.cells.num_unread(len(one.text)) == 16 + 32, "the first tokens need not be read again"
    one.read(100)
    assert one.cells.tokens == [*range(4), *[60] * 16, *one.text[-32:]]


def test_cells_that_are_copied_keep_their_positions() -> None:
    text = [*range(4), *[50] * 16, *[60] * 16, *[70] * 16, *[80] * 16, *[1] * 30, 60, 60]
    one = Follower(Window(4, 32, 16, 16))
    one.begin(text)
    one.copy()
    assert sorted(one.cache.cells) == [*range(4), *range(20, 36), *range(len(text) - 33, len(text) - 1)]
    one.read(10)
    assert one.cells.next_position == len(text)
