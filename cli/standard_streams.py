"""Makes stdin, stdout and stderr usable, whatever the caller has closed and whatever stdout's encoding is."""

from __future__ import annotations

import io
import os
import sys


def prepare() -> None:
    """Open the null device on closed descriptors, and let stdout and stderr write any text.

    Without the first, the next file that is opened gets the number of a standard stream, and libraries write into it.
    A character that stdout's encoding lacks is written as `?`.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
    sys.stdout = sys.stdout or _to_nowhere()
    sys.stderr = sys.stderr or _to_nowhere()
    if isinstance(sys.stdout, io.TextIOWrapper) and not _is_utf8(sys.stdout.encoding):
        sys.stdout.reconfigure(errors="replace")


def _to_nowhere() -> io.TextIOWrapper:
    return open(os.devnull, "w", encoding="utf-8")


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("-", "").replace("_", "") == "utf8"
