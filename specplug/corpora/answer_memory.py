"""A corpus that grows by answers, one process after the other: small shards are merged, and the oldest are dropped.

It is a folder like that of any corpus, so that `datastore` drafts from it and `specplug corpus` lists and removes it.
Beside it lies what was learned of the acceptance of draft tokens. Nothing here depends on an engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from pathlib import Path

import numpy as np

from specplug.core import IntArray
from specplug.corpora.folder import LEARNED, Manifest, ShardEntry, check_tokenizer, exists, place, read_manifest
from specplug.corpora.writing import (
    PRIVATE_FILE,
    Document,
    check_out,
    documents_of,
    folder_lock,
    listed_documents,
    writing,
)
from specplug.errors import UsageError
from specplug.machine.files import write_atomically

SHARDS = 4
"""The bound of a memory in shards of the largest size: what is dropped at once is less than a third of it."""

LARGEST_SHARD = 1 << 18
"""Tokens. Sorting so many takes 50 ms, or 0.5 s without `pydivsufsort`."""

PROMPT_TOKENS = 8
"""Tokens at the end of a prompt that are kept before an answer: with one chat template they match at once."""

SOURCE = "remembered answers"
"""What the manifest's sources say."""

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

    def check(self) -> bool:
        """Whether anything is remembered yet.

        UsageError where the folder holds something else than a memory, or one of another tokenizer.
        """
        folder = self.folder
        check_out(folder)
        if not exists(folder):
            return False
        manifest = read_manifest(folder, self.ref)
        if not is_memory(manifest):
            raise UsageError(f"corpus {self.ref}: it was built from documents; remember answers under another name")
        check_tokenizer(manifest, self.ref, self.tokenizer, self.num_tokens, self.model)
        return True

    def add(self, answers: Sequence[IntArray], waiting: Callable[[], None] = lambda: None) -> None:
        """Add answers (int32[n] each) that are not there yet.

        waiting  called where another process writes
        UsageError where the folder holds something else, or is damaged; SpecplugError where it cannot be written.
        """
        with folder_lock(self.folder, waiting):
            entries = list(read_manifest(self.folder, self.ref).shards) if self.check() else []
            known = {digest for entry in entries for _, digest, *_ in listed_documents(self.folder, entry)}
            documents = []
            for tokens in answers:
                digest = sha256(tokens.astype("<i4").tobytes()).hexdigest()[:32]
                if digest not in known and len(tokens):
                    known.add(digest)
                    documents.append(Document.complete("answer", digest, tokens))
            if documents:
                self._write(entries, documents)

    def _write(self, entries: list[ShardEntry], documents: list[Document]) -> None:
        """Publish the shards that stay, and the new documents with those of the small shards before them."""
        most = min(LARGEST_SHARD, max(2, self.max_tokens // SHARDS))
        size = sum(len(document.tokens) + 1 for document in documents)
        while entries and entries[-1].tokens < 2 * size and entries[-1].tokens + size <= most:
            size += entries[-1].tokens
            documents = [*documents_of(self.folder, entries.pop(), self.num_tokens), *documents]
        while entries and size + sum(entry.tokens for entry in entries) > self.max_tokens:
            del entries[0]
        settings = {"remembered": True, "max_tokens": self.max_tokens}
        manifest = Manifest(self.tokenizer, self.num_tokens, self.model, (), "", settings)
        with writing(self.folder, manifest, shard_tokens=most, kept=entries) as writer:
            for document in documents:
                writer.add(document)
            writer.publish([SOURCE])

    def learned(self) -> dict[str, tuple[float, float]]:
        """(hits, misses) by bucket, as `keep_learned` kept them for this model; empty where there are none."""
        return dict(_read_learned(self.folder).get(self.identity, {}))

    def keep_learned(self, learned: Acceptance) -> None:
        """SpecplugError where it cannot be written."""
        with folder_lock(self.folder, lambda: None):
            if not exists(self.folder):
                return  # removed meanwhile, or nothing was worth remembering
            models = _read_learned(self.folder)
            own = models.pop(self.identity, {})
            for name, (hits, misses) in learned.items():
                own[name] = hits, misses
            models = {**dict([*models.items()][1 - MOST_MODELS :]), self.identity: own}
            path = self.folder / LEARNED
            write_atomically(path, json.dumps({"schema": SCHEMA, "models": models}).encode())
            path.chmod(PRIVATE_FILE)


def is_memory(manifest: Manifest) -> bool:
    """Whether a corpus grows by answers, and not by builds."""
    return manifest.settings.get("remembered") is True


def answer_document(prompt: IntArray, answer: Sequence[int], *, prompts: bool) -> IntArray:
    """int32[n]: what is remembered of an answer: the prompt or its end, and the answer."""
    return np.concatenate((prompt if prompts else prompt[-PROMPT_TOKENS:], np.asarray(answer, np.int32)))


def _read_learned(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """By model; nothing where the file is missing or damaged."""
    models: dict[str, dict[str, tuple[float, float]]] = {}
    try:
        data = json.loads((folder / LEARNED).read_bytes())
        if data["schema"] != SCHEMA:
            return {}
        for model, counts in data["models"].items():
            pairs = {str(name): (float(hits), float(misses)) for name, (hits, misses) in counts.items()}
            if all(isfinite(h) and isfinite(m) and h >= 0 and m >= 0 for h, m in pairs.values()):
                models[model] = pairs
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return models
