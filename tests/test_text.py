from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.generation.text import Segment, TextStream


def shown(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def run(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> str:
    """The text shown for one token after the other."""
    stream = TextStream(stop)
    out = "".join(shown(stream.feed(piece, False)) for piece in pieces)
    return out + shown(stream.close())


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    ends = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(ends)]


some_cuts = st.lists(st.integers(0, 40), max_size=12)


# -- characters ------------------------------------------------------------------------------------------------------


def test_a_character_is_shown_with_its_last_byte() -> None:
    stream = TextStream()
    euro = "€".encode()
    assert len(euro) == 3
    assert stream.feed(b"a" + euro[:1], False) == [Segment("a", False)]
    assert stream.feed(euro[1:2], False) == []
    assert stream.feed(euro[2:] + b"b", False) == [Segment("€b", False)]
    assert stream.close() == []


def test_a_split_character_belongs_to_the_token_of_its_last_byte() -> None:
    stream = TextStream()
    euro = "€".encode()
    assert stream.feed(euro[:2], False) == []
    assert stream.feed(euro[2:], True) == [Segment("€", True)]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\xffb", "a�b"),
        (b"\xe2\x82a", "�a"),
        (b"\x80", "�"),
        (b"\xc0\xaf", "��"),
        (b"\xed\xa0\x80", "���"),
    ],
)
def test_invalid_bytes_are_replaced(data: bytes, text: str) -> None:
    assert run([data]) == text
    assert run([bytes([byte]) for byte in data]) == text


def test_an_incomplete_character_is_replaced_at_the_end() -> None:
    stream = TextStream()
    assert stream.feed(b"a\xe2\x82", True) == [Segment("a", True)]
    assert stream.close() == [Segment("�", False)]


@given(st.binary(max_size=30), some_cuts)
def test_any_bytes_split_anywhere_make_the_complete_text(data: bytes, cuts: list[int]) -> None:
    assert run(split(data, cuts)) == data.decode("utf-8", "replace")


@given(st.text(max_size=15), some_cuts)
def test_valid_text_is_unchanged(text: str, cuts: list[int]) -> None:
    assert run(split(text.encode(), cuts)) == text


def test_a_token_without_bytes_shows_no_text() -> None:
    stream = TextStream(["x"])
    assert stream.feed(b"", False) == []
    assert stream.close() == []


# -- stop strings ----------------------------------------------------------------------------------------------------


def test_text_ends_before_the_stop_string() -> None:
    stream = TextStream(["END"])
    assert stream.feed(b"one END two", True) == [Segment("one ", True)]
    assert stream.stopped
    assert stream.feed(b"more", True) == []
    assert stream.close() == []


def test_a_stop_string_split_over_tokens() -> None:
    stream = TextStream(["END"])
    assert stream.feed(b"one E", False) == [Segment("one ", False)]
    assert stream.feed(b"N", False) == []
    assert not stream.stopped
    assert stream.feed(b"D.", False) == []
    assert stream.stopped


def test_a_prefix_that_does_not_continue_as_a_stop_string_is_shown() -> None:
    stream = TextStream(["END"])
    assert stream.feed(b"E", True) == []
    assert stream.feed(b"N", False) == []
    assert stream.feed(b"E", False) == [Segment("E", True), Segment("N", False)]
    assert stream.feed(b"!", True) == [Segment("E", False), Segment("!", True)]
    assert not stream.stopped


def test_a_prefix_of_a_stop_string_is_shown_at_the_end() -> None:
    stream = TextStream(["END"])
    assert stream.feed(b"an EN", True) == [Segment("an ", True)]
    assert stream.close() == [Segment("EN", True)]
    assert not stream.stopped


def test_a_stop_string_that_begins_again_inside_itself() -> None:
    """aab in aaab: the stop string begins at the second a."""
    assert run([b"a", b"a", b"a", b"b"], ["aab"]) == "a"


def test_a_stop_string_that_close_completes() -> None:
    """Its last character replaces one that is incomplete."""
    stream = TextStream(["x�"])
    assert stream.feed(b"ax\xe2", False) == [Segment("a", False)]
    assert stream.close() == []
    assert stream.stopped


def test_the_longest_prefix_of_any_stop_string_is_held_back() -> None:
    stream = TextStream(["<|end|>", "|x"])
    assert stream.feed(b"a<|", False) == [Segment("a", False)]
    assert stream.feed(b"x", False) == [Segment("<", False)]
    assert stream.stopped


def test_the_cut_does_not_depend_on_how_the_text_is_split() -> None:
    assert run([b"abc"], ["abc", "b"]) == run([b"a", b"b", b"c"], ["abc", "b"])


def test_empty_stop_strings_are_ignored() -> None:
    assert run([b"abc"], [""]) == "abc"


def test_characters_of_a_stop_string_split_over_tokens() -> None:
    stop = "→."
    data = "a→.b".encode()
    assert run([bytes([byte]) for byte in data], [stop]) == "a"


@given(
    st.text("ab€", max_size=14),
    some_cuts,
    st.integers(1, 3).flatmap(lambda n: st.lists(st.text("ab€", min_size=n, max_size=n), min_size=1, max_size=3)),
)
def test_equals_cutting_the_complete_text(text: str, cuts: list[int], stop: list[str]) -> None:
    """The stop strings have the same length, so that the first to begin is the first to be complete."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    assert run(split(text.encode(), cuts), stop) == text[: min(found, default=len(text))]


@given(
    st.text("ab", max_size=14),
    some_cuts,
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_shown_text_contains_no_stop_string(text: str, cuts: list[int], stop: list[str]) -> None:
    out = run(split(text.encode(), cuts), stop)
    assert text.startswith(out)
    assert not any(s in out for s in stop)
    assert out == text or any(text.startswith(s, len(out)) for s in stop)


@given(st.lists(st.tuples(st.text("ab", max_size=3), st.booleans()), max_size=8), st.text("ab", min_size=1, max_size=3))
def test_every_character_keeps_its_flag(pieces: list[tuple[str, bool]], stop: str) -> None:
    stream = TextStream([stop])
    segments = [segment for text, drafted in pieces for segment in stream.feed(text.encode(), drafted)]
    segments += stream.close()
    assert all(segment.text for segment in segments)
    flags = [drafted for text, drafted in pieces for _ in text]
    shown_flags = [segment.drafted for segment in segments for _ in segment.text]
    assert shown_flags == flags[: len(shown_flags)]
