"""Reads the documents of a corpus: text files, code trees, JSONL, standard input.

What cannot be read as UTF-8 text is skipped and counted. Files that a .gitignore file excludes are left out where the
package `pathspec` is installed. The module does not depend on tokenizers.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specplug.errors import UsageError

LARGEST_FILE = 64 << 20
"""Bytes. A larger file is skipped: it is data rather than text that someone wrote."""

CHECKED_BYTES = 8192
"""A file with a zero byte in so many bytes at its beginning is not text."""

STANDARD_INPUT = "-"
IGNORE_FILE = ".gitignore"

NEVER_ENTERED = ("__pycache__", "node_modules")
"""Folders whose files nobody wrote, beside hidden ones."""


@dataclass(frozen=True, slots=True)
class Text:
    """One document: where it is from, and what it says."""

    name: str
    text: str


@dataclass(slots=True)
class Skipped:
    """Files that were left out, by the reason."""

    by_reason: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.by_reason.setdefault(reason, []).append(name)

    @property
    def count(self) -> int:
        return sum(map(len, self.by_reason.values()))

    def in_words(self) -> str:
        """For example `3 not UTF-8 (a.bin, b.bin ...), 1 empty (c.txt)`."""
        return ", ".join(
            f"{len(names)} {reason} ({', '.join(names[:2])}{' ...' if len(names) > 2 else ''})"
            for reason, names in self.by_reason.items()
        )


def texts(
    sources: Sequence[str],
    skipped: Skipped,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    standard_input: Callable[[], bytes] = lambda: sys.stdin.buffer.read(),
) -> Iterator[Text]:
    """The documents of files, of all files in folders, and of standard input (`-`), in a stable order.

    include, exclude  patterns of paths below a folder, such as `*.py` or `docs/*`
    UsageError for a source that does not exist, or that can be read only once.
    """
    for source in sources:
        if source == STANDARD_INPUT:
            yield from _documents("stdin", standard_input(), skipped)
            continue
        path = Path(source)
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise UsageError(f"{source}: cannot be read ({error.strerror})") from None
        if stat.S_ISDIR(mode):
            for found in files_below(path, skipped, include, exclude):
                yield from _of_file(found, skipped)
        elif stat.S_ISREG(mode):
            yield from _of_file(path, skipped)
        else:
            raise UsageError(f"{source}: neither a file nor a folder; name - and pass it on standard input")


def reads_ignore_files() -> bool:
    return find_spec("pathspec") is not None


def files_below(
    folder: Path, skipped: Skipped, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Iterator[Path]:
    """Files of a tree in alphabetical order, without hidden ones and those that a .gitignore in the repository names.

    The rules above a folder do not count where they exclude the folder itself, because the user has named it.
    """
    top = _repository(folder)
    rules = {parent: _rules(parent) for parent in folder.parents if parent.is_relative_to(top)}
    if _is_ignored(folder, rules, "/"):
        rules = {}

    def unreadable(error: OSError) -> None:
        skipped.add("unreadable", as_text(error.filename or folder))

    for name, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(name)
        rules.setdefault(here, _rules(here))
        folders[:] = sorted(
            one
            for one in folders
            if one not in NEVER_ENTERED and not one.startswith(".") and not _is_ignored(here / one, rules, "/")
        )
        for file in sorted(files):
            path = here / file
            below = path.relative_to(folder).as_posix()
            if file.startswith(".") or (include and not _matches(below, include)) or _matches(below, exclude):
                continue
            if _is_ignored(path, rules, ""):
                continue
            try:
                regular = stat.S_ISREG(path.stat().st_mode)
            except OSError:
                skipped.add("unreadable", as_text(path))
                continue
            if regular:
                yield path


def as_text(name: object) -> str:
    """A file name as text, also where it is not UTF-8."""
    return os.fsencode(str(name)).decode("utf-8", "backslashreplace")


def _repository(folder: Path) -> Path:
    """The root of the repository that a folder is in; the folder itself where it is in none."""
    absolute = folder.absolute()
    for parent, above in zip((absolute, *absolute.parents), (folder, *folder.parents), strict=False):
        if os.path.exists(parent / ".git"):
            return above
    return folder


def _matches(below: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(below, pattern) or fnmatch(Path(below).name, pattern) for pattern in patterns)


def _rules(folder: Path) -> Any:
    """The rules of a folder's .gitignore; None without one that can be read. Lines that are no pattern are left out."""
    if not reads_ignore_files():
        return None
    from pathspec import GitIgnoreSpec

    path = folder / IGNORE_FILE
    try:
        if not path.is_file():
            return None
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    valid = []
    for line in lines:
        try:
            GitIgnoreSpec.from_lines([line])
        except ValueError:
            continue
        valid.append(line)
    return GitIgnoreSpec.from_lines(valid)


def _is_ignored(path: Path, rules: dict[Path, Any], ending: str) -> bool:
    """The last matching rule of the nearest .gitignore that has one decides."""
    for parent in path.parents:
        spec = rules.get(parent)
        found = spec.check_file(path.relative_to(parent).as_posix() + ending).include if spec is not None else None
        if found is not None:
            return bool(found)
    return False


def _of_file(path: Path, skipped: Skipped) -> Iterator[Text]:
    name = as_text(path)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= LARGEST_FILE else b""
    except OSError:
        skipped.add("unreadable", name)
        return
    if size > LARGEST_FILE:
        skipped.add(f"larger than {LARGEST_FILE >> 20} MiB", name)
        return
    yield from _documents(name, content, skipped)


def _documents(name: str, content: bytes, skipped: Skipped) -> Iterator[Text]:
    if b"\0" in content[:CHECKED_BYTES]:
        skipped.add("binary", name)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped.add("not UTF-8", name)
        return
    if not text.strip():
        skipped.add("empty", name)
    elif name.endswith(".jsonl"):
        yield from _of_lines(name, text, skipped)
    else:
        yield Text(name, text)


def _of_lines(name: str, text: str, skipped: Skipped) -> Iterator[Text]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            joined = "\n\n".join(_strings(json.loads(line)))
            joined.encode()  # fails for half of a surrogate pair
        except (ValueError, RecursionError):
            skipped.add("damaged lines", f"{name}:{number}")
            continue
        if joined.strip():
            yield Text(f"{name}:{number}", joined)
        else:
            skipped.add("lines without text", f"{name}:{number}")


def _strings(value: Any) -> Iterator[str]:
    """The texts of a line: a string, or what an object has under text, prompt, turns, messages or answer."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key in ("prompt", "turns", "messages", "content", "text", "answer"):
            if key in value:
                yield from _strings(value[key])
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
