"""A corpus that grows by answers, one process after the other: small shards are merged, and the oldest are dropped.

It is a folder like that of any corpus, so that `datastore` drafts from it and `specplug corpus` lists and removes it.
Beside it lies what was learned of the acceptance of draft tokens. Nothing here depends on an engine.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from pathlib import Path

import numpy as np

from specplug.core import IntArray
from specplug.corpora.folder import (
    AGAIN,
    LEARNED,
    SIZE_LIMIT,
    Manifest,
    ShardEntry,
    check_tokenizer,
    exists,
    is_file,
    place,
    read_manifest,
)
from specplug.corpora.writing import (
    PRIVATE_FILE,
    Document,
    check_out,
    documents_of,
    folder_lock,
    listed_documents,
    unfinished,
    writing,
)
from specplug.errors import UsageError
from specplug.machine.files import write_atomically

LARGEST_SHARD = 1 << 18
"""Tokens. Sorting so many takes 50 ms, or 0.5 s without `pydivsufsort`. Shards of very large memories are larger."""

FEWEST_SHARDS, MOST_SHARDS = 4, 16
"""How many shards of the largest size a full memory has: the oldest shard is dropped at once, and every lookup searches
all of them. There may be some smaller ones, too."""

LOCK_SECONDS = 10.0
"""How long another process that writes is waited for."""

PROMPT_TOKENS = 8
"""Tokens at the end of a prompt that are kept before an answer: with one chat template they match at once."""

SOURCE = "remembered answers"
"""What the manifest's sources say."""

ADVICE = "remember answers under another name"

MOST_MODELS = 16
"""Models whose acceptance is kept."""

SCHEMA = 1
"""Of the file with the acceptance; others are not read."""

Acceptance = Mapping[str, Sequence[float]]
"""(hits, misses) by the name of the bucket."""


@dataclass(frozen=True, slots=True)
class Memory:
    """
    ref         how the user names it
    model       its name, for people
    identity    tells models apart
    tokenizer   `references.tokenizer_hash` of the model
    num_tokens  size of its vocabulary
    max_tokens  of all answers together; older ones are dropped
    """

    ref: str
    model: str
    identity: str
    tokenizer: str
    num_tokens: int
    max_tokens: int

    @property
    def folder(self) -> Path:
        return place(self.ref)

    def check(self) -> Manifest | None:
        """What is remembered so far; None where that is nothing.

        UsageError where the folder holds something else than a memory, or one of another tokenizer, or is damaged.
        """
        folder = self.folder
        check_out(folder)
        if not exists(folder):
            if unfinished(folder) is not None:
                raise UsageError(f"corpus {self.ref}: a build of it was interrupted; {ADVICE}, or finish or remove it")
            return None
        with self._damage_explained():
            manifest = read_manifest(folder, self.ref)
        if not is_memory(manifest):
            raise UsageError(f"corpus {self.ref}: it was built from documents; {ADVICE}")
        check_tokenizer(manifest, self.ref, self.tokenizer, self.num_tokens, self.model, ADVICE)
        with self._damage_explained():
            for entry in manifest.shards:
                listed_documents(folder, entry)
        return manifest

    def add(self, answers: Sequence[IntArray], waiting: Callable[[], None] = lambda: None) -> None:
        """Add answers (int32[n] each) that are not there yet. Those that do not fit beside newer ones are dropped.

        waiting  called where another process writes
        UsageError where the folder holds something else, or is damaged; SpecplugError where it cannot be written, or
        where another process writes for too long.
        """
        with folder_lock(self.folder, waiting, LOCK_SECONDS):
            manifest = self.check()
            # Another model of the tokenizer may have begun it, with ids for fewer tokens.
            num_tokens = manifest.num_tokens if manifest is not None else self.num_tokens
            newest = self._fitting(answers, num_tokens)
            entries = list(manifest.shards) if manifest is not None else []
            size = sum(map(self._size, newest))
            while entries and size + sum(entry.tokens for entry in entries) > self.max_tokens:
                del entries[0]
            known = {digest for entry in entries for _, digest, *_ in listed_documents(self.folder, entry)}
            new = [document for document in newest if document.digest not in known]
            if new:
                with self._damage_explained():
                    self._write(entries, new, num_tokens)

    @property
    def _shard_tokens(self) -> int:
        """Tokens of a shard at most."""
        return max(min(LARGEST_SHARD, self.max_tokens // FEWEST_SHARDS), self.max_tokens // MOST_SHARDS)

    def _size(self, document: Document) -> int:
        """Tokens that a document takes, with a separator after each of its parts."""
        return len(document.tokens) - (-len(document.tokens) // (self._shard_tokens - 1))

    def _fitting(self, answers: Sequence[IntArray], num_tokens: int) -> list[Document]:
        """The newest answers that fit, each once, the oldest first; of one that is too long, the end."""
        found: dict[str, Document] = {}
        left = self.max_tokens
        for answer in reversed(answers):
            room = left - -(-left // self._shard_tokens)  # without the separators of its parts
            tokens = answer[-room:] if room > 0 else answer[:0]
            digest = sha256(tokens.astype("<i4").tobytes()).hexdigest()[:32]
            if len(tokens) and digest not in found and int(tokens.max()) < num_tokens:
                found[digest] = Document.complete("answer", digest, tokens)
                left -= self._size(found[digest])
        return list(reversed(found.values()))

    def _write(self, entries: list[ShardEntry], documents: list[Document], num_tokens: int) -> None:
        """Publish the shards that stay, and the new documents with those of the small shards before them."""
        most = self._shard_tokens
        size = sum(map(self._size, documents))
        while entries and entries[-1].tokens < 2 * size and entries[-1].tokens + size <= most:
            size += entries[-1].tokens
            documents = [*documents_of(self.folder, entries.pop(), num_tokens), *documents]
        settings = {"remembered": True, "max_tokens": self.max_tokens}
        manifest = Manifest(self.tokenizer, num_tokens, self.model, (), "", settings)
        kept = "the answers before are kept"
        with writing(self.folder, manifest, shard_tokens=most, kept=entries, after_failure=kept) as writer:
            for document in documents:
                writer.add(document)
            writer.publish([SOURCE])

    def learned(self) -> dict[str, tuple[float, float]]:
        """(hits, misses) by bucket, as `keep_learned` kept them for this model; empty where there are none."""
        return dict(_read_learned(self.folder).get(self.identity, {}))

    def keep_learned(self, learned: Acceptance) -> None:
        """Keep counts for this model; those of buckets that are not named stay. Of two processes, the last one decides.

        SpecplugError where they cannot be written, or where another process writes for too long.
        """
        if not learned:
            return
        with folder_lock(self.folder, lambda: None, LOCK_SECONDS):
            if not exists(self.folder):
                return  # removed meanwhile
            models = _read_learned(self.folder)
            own = models.pop(self.identity, {})
            for name, (hits, misses) in learned.items():
                own[name] = hits, misses
            models = {**dict([*models.items()][1 - MOST_MODELS :]), self.identity: own}
            content = json.dumps({"schema": SCHEMA, "models": models}).encode()
            write_atomically(self.folder / LEARNED, content, PRIVATE_FILE)

    @contextmanager
    def _damage_explained(self) -> Iterator[None]:
        """Where files are damaged, say what can be done: nobody can build the answers again."""
        try:
            yield
        except UsageError as error:
            remove = f"specplug corpus remove {shlex.quote(self.ref)} forgets the answers"
            raise UsageError(str(error).replace(AGAIN, remove)) from None


def is_memory(manifest: Manifest) -> bool:
    """Whether a corpus grows by answers, and not by builds."""
    return manifest.settings.get("remembered") is True


def answer_document(prompt: IntArray, answer: Sequence[int], *, prompts: bool) -> IntArray:
    """int32[n]: what is remembered of an answer: the prompt or its end, and the answer."""
    return np.concatenate((prompt if prompts else prompt[-PROMPT_TOKENS:], np.asarray(answer, np.int32)))


def _read_learned(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """By model; nothing where the file is missing or damaged."""
    models: dict[str, dict[str, tuple[float, float]]] = {}
    path = folder / LEARNED
    try:
        if not is_file(path) or path.stat().st_size > SIZE_LIMIT:  # a pipe would be waited for
            return {}
        data = json.loads(path.read_bytes())
        if data["schema"] != SCHEMA:
            return {}
        for model, counts in data["models"].items():
            pairs = {str(name): (float(hits), float(misses)) for name, (hits, misses) in counts.items()}
            if all(isfinite(h) and isfinite(m) and h >= 0 and m >= 0 for h, m in pairs.values()):
                models[model] = pairs
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return models
