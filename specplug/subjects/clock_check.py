"""Compares the times that a server reports for its answers with the clock of the stream in which they arrived."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.subjects.subject import Reply

TOLERANCE = 0.1
"""Share by which the two may differ. A stream also has the time of the connection, and servers may send tokens late."""

FEWEST_MS = 200.0
"""Shorter streams say nothing: a burst of a few tokens may arrive at once."""


def clock_difference(name: str, replies: Sequence[Reply]) -> str | None:
    """A sentence where a server's own times of decoding differ from those of its streams; None where they agree.

    Where a server has no times of its own, both are the same.
    """
    own = sum(reply.decode_ms for reply in replies)
    stream = sum(reply.stream_ms for reply in replies)
    if stream < FEWEST_MS or abs(own - stream) <= TOLERANCE * stream:
        return None
    return (
        f"{name} says that it decoded for {own / 1000:.2f} s, and its answers took {stream / 1000:.2f} s to arrive; "
        "speeds are from its own times, so compare them with care"
    )
