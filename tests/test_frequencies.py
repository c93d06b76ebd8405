"""Counting tokens: the documents that are counted, those that are held out, and texts that cannot be counted."""

from pathlib import Path
from random import Random

import numpy as np
import pytest

from specplug.build.frequencies import PIECE, count, held_out, pieces, read_text
from specplug.core import int_array
from specplug.errors import UsageError


def test_every_document_counts_either_for_the_choice_or_as_held_out() -> None:
    """Document i contains token i three times."""
    found = count({f"d{i}": [int_array([i, i]), int_array([i])] for i in range(40)}, 50)
    assert found.num_documents == 40 and len(found.held_out_names) == 4
    assert found.calibration.dtype == found.held_out.dtype == np.int64
    for i in range(40):
        is_held_out = f"d{i}" in found.held_out_names
        assert (found.calibration[i], found.held_out[i]) == ((0, 3) if is_held_out else (3, 0))
    assert found.calibration.sum() + found.held_out.sum() == 40 * 3
    assert found.calibration[40:].sum() == 0


@pytest.mark.parametrize(("documents", "held"), [(2, 1), (3, 1), (5, 2), (8, 4), (28, 4), (40, 4), (50, 5), (240, 24)])
def test_a_tenth_is_held_out_or_up_to_half_of_few_documents(documents: int, held: int) -> None:
    assert len(held_out([str(i) for i in range(documents)])) == held


def test_the_order_of_documents_does_not_matter_and_a_new_one_replaces_at_most_one() -> None:
    names = [f"question {i}" for i in range(100)]
    before = held_out(names)
    shuffled = names.copy()
    Random(0).shuffle(shuffled)
    assert held_out(shuffled) == before
    for new in ("one more", "another", "a third"):
        assert len(before - held_out([*names, new])) <= 1


@pytest.mark.parametrize("documents", [{}, {"a": [int_array([1])]}])
def test_fewer_than_two_documents_are_refused(documents: dict[str, list[np.ndarray]]) -> None:
    with pytest.raises(UsageError, match="at least 2 are needed"):
        count(documents, 10)


def test_documents_without_tokens_are_refused() -> None:
    empty = int_array([])
    with pytest.raises(UsageError, match="nothing was counted"):
        count({"a": [empty], "b": [empty]}, 10)


def test_pieces_are_complete_lines_where_lines_are_short_enough() -> None:
    text = "one\ntwo\nthree\n" + "x" * 25 + "\nlast"
    found = pieces(text, 10)
    assert found == ["one\ntwo\n", "three\n", "x" * 10, "x" * 10, "x" * 5 + "\nlast"[:1] + "last"]
    assert "".join(found) == text


def test_a_text_is_read_as_utf_8_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    line = "Grüße aus Köln\n"
    path.write_bytes(b"\xef\xbb\xbf" + (line * 4000).encode())
    found = read_text(path)
    assert "".join(found) == line * 4000
    assert max(map(len, found)) <= PIECE and len(found) >= len(line) * 4000 / PIECE


def test_a_short_text_is_still_cut_into_pieces(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("a few words in one line")
    assert len(read_text(path)) >= 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" \n\t\n", "holds no text"),
        (b"abc\xff", "byte 3 is not UTF-8"),
        (None, "cannot be read"),
    ],
    ids=["empty", "blank", "not UTF-8", "missing"],
)
def test_files_without_readable_text_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_text(path)
