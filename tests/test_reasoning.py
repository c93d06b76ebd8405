"""Reasoning is separated from the answer in the same way however the text is divided into pieces."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.server.reasoning import FAMILIES, Marks, ReasoningReader, marks_of, opens_reasoning

THINK = FAMILIES[0]


def read(pieces: list[str], *, opened: bool = False, marks: Marks = THINK) -> tuple[str, str]:
    reader = ReasoningReader(marks, opened=opened)
    parts = [*map(reader.feed, pieces), reader.close()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nAdd them.\n</think>\n\nFour.", False, ("Add them.", "Four.")),
        ("\n<think>a</think>b", False, ("a", "b")),
        ("Add them.\n</think>\n\nFour.", True, ("Add them.", "Four.")),
        ("<think>\n\n</think>\n\nFour.", False, ("", "Four.")),
        ("Four.", False, ("", "Four.")),
        ("  Four, <think> is a mark.", False, ("", "  Four, <think> is a mark.")),
        ("<think>never ends, a < b", False, ("never ends, a < b", "")),
        ("<think>a\n\nb</think>c\n\nd\n", False, ("a\n\nb", "c\n\nd\n")),
        ("<thi", False, ("", "<thi")),
        ("<think", False, ("", "<think")),
        ("a</thin", True, ("a</thin", "")),
        ("</think>", True, ("", "")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("", True, ("", "")),
    ],
)
def test_what_is_reasoning(text: str, opened: bool, expected: tuple[str, str]) -> None:
    assert read([text], opened=opened) == expected
    assert read(list(text), opened=opened) == expected


ALPHABET = st.sampled_from(["<think>", "</think>", "<", ">", "/", "think", " ", "\n", "a"])


@given(st.lists(ALPHABET), st.lists(st.integers(0, 60)), st.booleans())
def test_pieces_make_no_difference(parts: list[str], cuts: list[int], opened: bool) -> None:
    text = "".join(parts)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert read(pieces, opened=opened) == read([text], opened=opened)


@given(st.lists(ALPHABET))
def test_nothing_but_white_space_is_lost(parts: list[str]) -> None:
    text = "".join(parts)
    reasoning, answer = read([text])
    whole = "".join(text.split())
    kept = "".join((reasoning + answer).split())
    removed = whole if kept == whole else whole.replace("<think>", "", 1).replace("</think>", "", 1)
    assert kept in (whole, removed) or kept == whole.replace("<think>", "", 1)


@pytest.mark.parametrize("marks", FAMILIES, ids=lambda marks: marks.opening)
def test_every_family_is_found_by_its_template(marks: Marks) -> None:
    template = "{% if thinking %}" + marks.opening + "{{ t }}" + marks.closing + "{% endif %}"
    assert marks_of(template) == marks
    assert read([f"{marks.opening}a{marks.closing}b"], marks=marks) == ("a", "b")
    assert opens_reasoning(marks, f"assistant\n{marks.opening}\n") and not opens_reasoning(marks, "assistant\n")
    assert marks_of("{{ messages }}") is None
