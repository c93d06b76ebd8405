"""Several subjects at once, of which only the one that is asked computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from specplug.subjects.subject import Subject


@contextmanager
def awake(subject: Subject) -> Iterator[Subject]:
    """Wake it for the block, and put it to sleep afterwards."""
    subject.wake()
    try:
        yield subject
    finally:
        subject.sleep()
