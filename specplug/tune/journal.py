"""The journal of a tune: an append-only file of finished steps, so that an interruption loses only the current one.

This module is responsible for lines, checksums and the lock. It does not depend on what the entries mean.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from specplug.errors import SpecplugError, UsageError
from specplug.machine.folders import reason

Entry = dict[str, Any]


class Journal:
    """The entries of a journal, which are plain data with a `kind`, and the seconds that were `spent` before each."""

    def __init__(self, path: Path, entries: list[Entry], file: IO[bytes], kept: int) -> None:
        """`kept` is how many bytes of `file` are kept; the rest is removed when the first entry is added."""
        self.path = path
        self.entries = entries
        self._file = file
        self._kept: int | None = kept

    @property
    def spent(self) -> float:
        """Seconds until the latest entry; 0 for a new journal."""
        return float(self.entries[-1]["spent"]) if self.entries else 0.0

    def add(self, kind: str, **values: Any) -> Entry:
        """Append an entry and return it; by then it is on the disk."""
        entry = {"kind": kind, **values}
        try:
            if self._kept is not None:
                self._file.truncate(self._kept)
                self._file.seek(self._kept)
                self._kept = None
            self._file.write(_line(entry))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SpecplugError(
                f"{self.path}: cannot be written ({error.strerror or error}); free disk space"
            ) from error
        self.entries.append(entry)
        return entry

    def of(self, kind: str) -> list[Entry]:
        return [entry for entry in self.entries if entry["kind"] == kind]

    def last(self, kind: str) -> Entry | None:
        """The latest entry of a kind."""
        return next((entry for entry in reversed(self.entries) if entry["kind"] == kind), None)


@contextmanager
def opened(path: Path, *, resume: bool, notify: Callable[[str], None] = lambda text: None) -> Iterator[Journal]:
    """The journal at `path`, continued or new, locked for this process.

    notify  receives a sentence where an incomplete last line, or an unfinished tune, is dropped by the first new entry

    UsageError when another process has locked it, when there is nothing to resume, or when a line other than the last
    is damaged.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{path}.lock", blocking=False))
            entries, torn, kept = _read(path) if resume else ([], False, 0)
            dropped = not resume and _is_unfinished(path)
            file = stack.enter_context(open(path, "r+b" if path.exists() else "w+b"))
        except Timeout:
            raise UsageError(f"{path}: another tune of this profile is running; wait, or use another --out") from None
        except OSError as error:
            raise SpecplugError(f"{path}: cannot be used ({reason(path, error)})") from error
        if torn:
            notify("the last line of the journal is incomplete; its step is done again")
        if dropped:
            notify("starting again: an unfinished tune of this profile is discarded (--resume would have continued it)")
        yield Journal(path, entries, file, kept)


def _line(entry: Entry) -> bytes:
    text = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read(path: Path) -> tuple[list[Entry], bool, int]:
    """The entries, whether the last line is incomplete, and how many bytes the complete lines take."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: nothing to resume; run without --resume") from None
    entries: list[Entry] = []
    kept = 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        entry = _entry(line)
        if entry is None:
            if kept + len(line) == len(content):
                return entries, True, kept
            raise UsageError(f"{path}: line {number} is damaged (checksum); run without --resume to start again")
        entries.append(entry)
        kept += len(line)
    return entries, False, kept


def _entry(line: bytes) -> Entry | None:
    """The inverse of `_line`; None for bytes that it did not write."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    entry: Entry = json.loads(text)
    return entry


def _is_unfinished(path: Path) -> bool:
    """Whether the file is the journal of a tune that did not finish."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return False
    last = _entry(lines[-1]) if lines else None
    return bool(lines) and (last is None or last["kind"] != "done")
