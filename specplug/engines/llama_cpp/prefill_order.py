"""Divides the prompt rows of a pass among the prompts that wait.

Works on numbers of rows, and does not depend on an engine.
Half of the rows are given first come, first served, which is best for prompts of equal length; the other half goes to
the shortest prompt, which is best for the mean wait.
"""

from __future__ import annotations

from collections.abc import Sequence


def shares(unread: Sequence[int], room: int) -> list[int]:
    """How many of `room` rows each prompt gets, where prompt i has `unread[i]` unread rows.

    The prompts are in order of arrival. Half of the rows go to the shortest one. The other rows, and those that it does
    not need, go to the prompts in order. So a short prompt does not wait for the long ones before it, and the first
    prompt is read with at least half of the rows, whatever arrives after it.
    """
    if not unread:
        return []
    shortest = min(range(len(unread)), key=unread.__getitem__)
    given = [0] * len(unread)
    given[shortest] = min(unread[shortest], room // 2)
    room -= given[shortest]
    for index, rows in enumerate(unread):
        more = min(rows - given[index], room)
        given[index] += more
        room -= more
    return given
