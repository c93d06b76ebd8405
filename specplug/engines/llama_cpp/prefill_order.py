"""Whose prompts a pass reads, where several wait.

Knows how many rows there are, how many each prompt lacks. Knows no engine.
Half the rows first come, first served (best among equals), half to the shortest (best for the mean wait).
"""

from __future__ import annotations

from collections.abc import Sequence


def shares(left: Sequence[int], room: int) -> list[int]:
    """How many of `room` rows each prompt gets, where `left[i]` rows of it are unread, the first come first.

    Half go to the first, half to the shortest, and what they leave to the others in order: a short prompt need not wait
    for the long ones before it, and the first is read at half the speed at worst, whoever comes after it.
    """
    if not left:
        return []
    shortest = min(range(len(left)), key=left.__getitem__)
    found = [0] * len(left)
    found[shortest] = min(left[shortest], room // 2)
    room -= found[shortest]
    for index, unread in enumerate(left):
        more = min(unread - found[index], room)
        found[index] += more
        room -= more
    return found
