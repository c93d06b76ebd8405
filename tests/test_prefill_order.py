"""Which prompts a pass reads."""

from hypothesis import given
from hypothesis import strategies as st

from specplug.engines.llama_cpp.prefill_order import shares


def passes_until_read(left: list[int], room: int) -> list[int]:
    """The pass, counted from 1, in which each prompt is read to its end."""
    ends, done = [0] * len(left), 0
    while any(left):
        done += 1
        unread = [index for index, rows in enumerate(left) if rows]
        for index, rows in zip(unread, shares([left[index] for index in unread], room), strict=True):
            left[index] -= rows
            if not left[index]:
                ends[index] = done
    return ends


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    """Of 20 rows per pass, the short prompt gets 10 in 5 passes; the first gets the other 10, then all."""
    assert passes_until_read([2000, 2000, 50], 20) == [103, 203, 5]
    assert passes_until_read([100, 100, 100], 20) == [5, 10, 15], "prompts of equal length are read in order"


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 40))
def test_no_row_is_left_unused_and_no_prompt_takes_more_than_twice_as_long(left: list[int], room: int) -> None:
    found = shares(left, room)
    assert all(0 <= rows <= unread for rows, unread in zip(found, left, strict=True))
    assert sum(found) == min(room, sum(left))
    ends = passes_until_read(list(left), room)
    for index, end in enumerate(ends):
        in_order = -(-sum(left[: index + 1]) // room)
        assert end <= 2 * in_order
