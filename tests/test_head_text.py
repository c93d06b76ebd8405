"""What a head's cells hold of the texts of slots, over a toy cache: whatever texts begin, go on and are cut."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llama_cpp")

from specplug.core import int_array
from specplug.engines.llama_cpp.drafters.head_text import HeadText, Layout

SLOTS = 2
WIDTH = 4

Entry = tuple[int, float]
"""A token, and the first number of the state of the token before it, which names all tokens up to there."""


class ToyCells:
    """Cells by sequence id and position, with llama.cpp's rule that positions follow each other."""

    def __init__(self) -> None:
        self.cells: list[dict[int, Entry]] = [{} for _ in range(SLOTS)]

    def drop(self, seq: int, start: int = -1, stop: int = -1) -> None:
        self.cells[seq] = {at: entry for at, entry in self.cells[seq].items() if start >= 0 and at < start}

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        self.cells[target] |= {at: entry for at, entry in self.cells[source].items() if start <= at < stop}

    def add(self, seq: int, position: int, entry: Entry) -> None:
        held = self.cells[seq]
        assert position == max(held) + 1 if held else position >= 0
        held[position] = entry


def name_of(tokens: list[int]) -> float:
    """The first number of the state after these tokens: whole, below 2 to the power of 11."""
    return float(hash(tuple(tokens)) % 2047 + 1)


class Target:
    """The texts of slots as a target keeps them, and a head that follows them."""

    def __init__(self, first: int) -> None:
        self.cells = ToyCells()
        self.layout = Layout(WIDTH, first)
        context: Any = self.cells
        self.heads = [HeadText(context, seq, self.layout) for seq in range(SLOTS)]
        self.texts: list[list[int]] = [[] for _ in range(SLOTS)]
        self.known = [True] * SLOTS
        """Whether the head has followed the complete text of each slot."""

    def begin(self, seq: int, prompt: list[int], *, known: bool = True) -> None:
        self.known[seq] = known or not prompt
        self.heads[seq].begin(int_array(prompt), self.heads)
        self.texts[seq] = list(prompt)

    def keep(self, seq: int, tokens: list[int]) -> None:
        text = self.texts[seq]
        states = [np.full(WIDTH, name_of(text + tokens[: at + 1]), dtype=np.float32) for at in range(len(tokens))]
        self.heads[seq].extend(len(text), tokens, np.array(states, dtype=np.float32).reshape(-1, WIDTH))
        self.texts[seq] = text + tokens

    def read(self, seq: int, root: int, drafts: int) -> None:
        """Let the head read all entries, that of `root` included, and then draft tokens, which are removed."""
        head, text = self.heads[seq], [*self.texts[seq], root]
        if head.end != len(text) - 1 or head.end <= head.start:
            return
        head.cut_stored(len(text) - 1)
        states = head.states(head.stored, len(text))
        for entry, state in zip(range(head.stored, len(text)), states, strict=True):
            self.cells.add(seq, self.layout.position(entry), (text[entry], float(state[0])))
        head.add_stored(len(text), root)
        for at in range(drafts):
            self.cells.add(seq, self.layout.position(len(text) + at), (-1, -1.0))
        head.drop_drafts()
        self.check(seq, text)

    def check(self, seq: int, text: list[int]) -> None:
        """The cells hold each entry as after reading the text anew, from the first one whose state is known."""
        head = self.heads[seq]
        assert head.start == 0 or not self.known[seq]
        wanted = {
            self.layout.position(entry): (text[entry], name_of(text[:entry]) if entry else 0.0)
            for entry in range(head.first, len(text))
        }
        assert self.cells.cells[seq] == wanted


SLOT = st.integers(0, SLOTS - 1)
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=5)
READ, KEEP = (st.tuples(st.just("read"), SLOT, st.integers(0, 2)), st.tuples(st.just("keep"), SLOT, TOKENS))
ACTION = st.one_of(
    READ,
    KEEP,
    READ,
    KEEP,
    st.tuples(st.just("cut"), SLOT, st.integers(0, 9)),
    st.tuples(st.just("share"), SLOT, SLOT, st.integers(0, 9)),
    st.tuples(st.just("unknown"), SLOT, TOKENS),
    st.tuples(st.just("fail"), SLOT),
)


@given(st.sampled_from([0, 1]), st.lists(ACTION, min_size=10, max_size=40))
def test_the_cells_hold_what_a_head_that_reads_anew_would_hold(first: int, actions: list[tuple[Any, ...]]) -> None:
    target = Target(first)
    for kind, seq, *rest in actions:
        if kind == "keep":
            target.keep(seq, rest[0])
        elif kind == "read":
            target.read(seq, rest[0], drafts=rest[0])
        elif kind == "cut":  # a prompt that begins as the text before it did
            target.begin(seq, target.texts[seq][: rest[0]], known=target.known[seq])
        elif kind == "share":  # a prompt that begins as the text of another slot
            target.begin(seq, target.texts[rest[0]][: rest[1]], known=target.known[rest[0]])
        elif kind == "unknown":  # a prompt that was loaded
            target.begin(seq, [9, *rest[0]], known=False)
        else:
            target.heads[seq].drop_cells()
    for seq in range(SLOTS):
        target.keep(seq, [1])
        target.read(seq, 2, drafts=1)
        assert target.heads[seq].end == len(target.texts[seq])


def test_a_beginning_of_another_slot_is_not_read_again() -> None:
    target = Target(first=1)
    target.keep(0, [1, 2, 1, 2, 0])
    target.read(0, 1, drafts=2)
    target.begin(1, [1, 2, 1])
    assert (target.heads[1].start, target.heads[1].stored) == (0, 3)
    target.begin(1, [1, 1])
    assert (target.heads[1].start, target.heads[1].tokens) == (2, [])
