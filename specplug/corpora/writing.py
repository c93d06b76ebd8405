"""Writes a corpus shard by shard, so that an interrupted build can go on, and publishes it in one step.

A shard's files have a name of their own and never change. What is published is what the manifest names: it is replaced
atomically, and files that it does not name are removed afterwards. Programs that have old files open keep them. Other
files in the folder are left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import numpy as np

from specplug.core import IntArray
from specplug.corpora.folder import (
    AGAIN,
    DOCUMENTS,
    JOURNAL,
    LEARNED,
    MANIFEST,
    Manifest,
    ShardEntry,
    exists,
    is_file,
    manifest_text,
    own_files,
    read_checked,
    read_manifest,
)
from specplug.corpora.shard import ORDER, STARTS, TOKENS, encoded, starts_of, widths
from specplug.corpora.suffix_order import suffix_order
from specplug.errors import SpecplugError, UsageError
from specplug.machine.files import locked, write_atomically
from specplug.machine.folders import reason

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700

Key = tuple[str, str]
"""(name, digest) of a document."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document, or a part of one.

    name    where it was read from
    digest  of its text
    tokens  int32[n], without a separator
    total   tokens of the complete document
    """

    name: str
    digest: str
    tokens: IntArray
    total: int

    @property
    def key(self) -> Key:
        return self.name, self.digest

    @classmethod
    def complete(cls, name: str, digest: str, tokens: IntArray) -> Document:
        return cls(name, digest, tokens, len(tokens))


class CorpusWriter:
    """Takes documents and writes shards. `writing` creates it."""

    def __init__(self, folder: Path, manifest: Manifest, shard_tokens: int) -> None:
        self._folder = folder
        self._manifest = manifest
        self._shard_tokens = shard_tokens
        self._waiting: list[Document] = []
        self._waiting_tokens = 0

    @property
    def size(self) -> int:
        """Tokens of all documents so far, with separators."""
        return self._manifest.size + self._waiting_tokens

    def add(self, document: Document) -> None:
        """Take a document; writes a shard when enough tokens wait. One that is longer than a shard is cut."""
        tokens = document.tokens
        while len(tokens):
            part, tokens = tokens[: self._shard_tokens - 1], tokens[self._shard_tokens - 1 :]
            if self._waiting_tokens + len(part) + 1 > self._shard_tokens:
                self.flush()
            self._waiting.append(replace(document, tokens=part))
            self._waiting_tokens += len(part) + 1

    def flush(self) -> None:
        """Write the documents that wait as a shard."""
        if not self._waiting:
            return
        entry = write_shard(self._folder, self._waiting, self._manifest.num_tokens)
        self._waiting, self._waiting_tokens = [], 0
        self._manifest = replace(self._manifest, shards=(*self._manifest.shards, entry))
        write_atomically(self._folder / JOURNAL, manifest_text(self._manifest), PRIVATE_FILE)

    def publish(self, sources: Sequence[str]) -> Manifest:
        """Write what waits, and replace the manifest. UsageError for a corpus without a token."""
        self.flush()
        if not self._manifest.shards:
            raise UsageError(f"{self._folder}: nothing to keep: the documents hold no tokens; name other files")
        self._manifest = replace(self._manifest, sources=tuple(sources))
        path = self._folder / MANIFEST
        write_atomically(path, manifest_text(self._manifest), PRIVATE_FILE)
        _remove_files(self._folder, kept=self._manifest.shards, others=(MANIFEST, LEARNED))
        return self._manifest


@contextmanager
def writing(
    folder: Path,
    manifest: Manifest,
    *,
    shard_tokens: int,
    kept: Iterable[ShardEntry] = (),
    after_failure: str = "complete shards are kept for --resume",
) -> Iterator[CorpusWriter]:
    """A writer of shards in this folder, whose lock (`folder_lock`) the caller holds.

    manifest  without shards
    kept      shards that the folder has already, and that stay
    after_failure
              what the message about a full disk says of what was written
    UsageError for a folder that holds something else. SpecplugError where the disk is full or the folder cannot be
    written; what was published stays, and complete shards remain for a later build.
    """
    try:
        _prepare(folder)
        yield CorpusWriter(folder, replace(manifest, shards=tuple(kept)), shard_tokens)
    except OSError as error:
        raise SpecplugError(f"{folder}: cannot be written ({reason(folder, error)}); {after_failure}") from error


def check_out(folder: Path) -> None:
    """UsageError for a folder that holds something else than a corpus, or what is left of one."""
    if folder.exists() and (not folder.is_dir() or {*folder.iterdir()} - {*own_files(folder)}) and not exists(folder):
        raise UsageError(f"{folder}: exists and is no corpus; name a new folder")


def _prepare(folder: Path) -> None:
    check_out(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not exists(folder):
        os.chmod(folder, PRIVATE_FOLDER)


@contextmanager
def folder_lock(folder: Path, waiting: Callable[[], None], timeout: float | None = None) -> Iterator[None]:
    """Only one process at a time changes a corpus. `waiting` is called where another one does.

    timeout  seconds to wait for it at most; then SpecplugError is raised
    """
    try:
        folder = folder.resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(folder.parent / f".{folder.name}.lock", waiting, timeout)
        lock.__enter__()
    except OSError as error:
        raise SpecplugError(f"{folder}: cannot be written ({reason(folder, error)})") from None
    except RuntimeError as error:  # links that lead to each other
        raise UsageError(f"{folder}: {error}") from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def write_shard(folder: Path, documents: Sequence[Document], num_tokens: int) -> ShardEntry:
    """Sort and write a shard."""
    how = widths(num_tokens)
    parts: list[IntArray] = []
    for document in documents:
        parts += [document.tokens, np.array([num_tokens], dtype=np.int32)]  # stands for the separator in memory
    tokens = np.concatenate(parts)
    starts = np.cumsum([0, *(len(document.tokens) + 1 for document in documents)])[:-1]
    listed = [[d.name, d.digest, int(s), len(d.tokens), d.total] for d, s in zip(documents, starts, strict=True)]
    contents = {
        TOKENS: encoded(np.where(tokens == num_tokens, how.separator, tokens), how),
        STARTS: starts_of(tokens, num_tokens).tobytes(),
        DOCUMENTS: json.dumps(listed).encode(),
        ORDER: suffix_order(tokens).astype("<u4", copy=False).tobytes(),
    }
    stem = uuid4().hex[:16]
    try:
        for ending, content in contents.items():
            _write(folder / f"{stem}.{ending}", content)
    except BaseException:
        for ending in contents:
            with suppress(OSError):
                (folder / f"{stem}.{ending}").unlink(missing_ok=True)
        raise
    hashes = {ending: sha256(content).hexdigest() for ending, content in contents.items()}
    return ShardEntry(stem, len(tokens), len(documents), hashes)


def listed_documents(folder: Path, entry: ShardEntry) -> list[tuple[str, str, int, int, int]]:
    """(name, digest, start, tokens, tokens of the complete document) of every document of a shard.

    UsageError where the list is damaged.
    """
    content = read_checked(folder, entry, DOCUMENTS)
    try:
        listed = [(str(a), str(b), int(c), int(d), int(e)) for a, b, c, d, e in json.loads(content)]
    except (ValueError, TypeError, RecursionError):
        listed = []
    if not listed or any(start < 0 or start + length > entry.tokens for _, _, start, length, _ in listed):
        raise UsageError(f"{folder / entry.stem}.{DOCUMENTS}: damaged; {AGAIN}")
    return listed


def documents_of(folder: Path, entry: ShardEntry, num_tokens: int) -> Iterator[Document]:
    """The documents of a shard. UsageError where it is damaged."""
    listed = listed_documents(folder, entry)
    tokens = np.frombuffer(read_checked(folder, entry, TOKENS), dtype=widths(num_tokens).dtype)
    for name, digest, start, length, total in listed:
        yield Document(name, digest, tokens[start : start + length].astype(np.int32), total)


def unfinished(folder: Path) -> Manifest | None:
    """The shards of an interrupted build; None where there is none that can be read."""
    try:
        return read_manifest(folder, file_name=JOURNAL) if is_file(folder / JOURNAL) else None
    except UsageError:
        return None


def remove(folder: Path) -> None:
    """Remove a corpus, or what an interrupted build left; other files stay. UsageError where there is neither."""
    try:
        found = own_files(folder)
    except OSError:
        found = []
    if not found:
        raise UsageError(f"{folder}: no corpus is there")
    try:
        (folder / MANIFEST).unlink(missing_ok=True)  # first, so that nobody opens a part of it
        _remove_files(folder, kept=(), others=())
        if not any(folder.iterdir()):
            folder.resolve().rmdir()
    except OSError as error:
        raise SpecplugError(f"{folder}: cannot be removed ({error.strerror or error})") from None


def _remove_files(folder: Path, kept: Iterable[ShardEntry], others: Iterable[str]) -> None:
    """Remove the corpus's files, and what interrupted writing left, but for `others` and the files of `kept`."""
    names = {*others, *(name for entry in kept for name in entry.file_names())}
    for path in own_files(folder):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
    with open(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
