"""Writes small corpora for tests, without a tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from specplug.core import int_array
from specplug.corpora.folder import Corpus, Manifest, open_corpus
from specplug.corpora.writing import Document, writing


def manifest_of(num_tokens: int, tokenizer: str = "0" * 64) -> Manifest:
    return Manifest(tokenizer, num_tokens, "toy", (), "", {})


def write_corpus(
    folder: Path,
    documents: Sequence[Sequence[int]],
    num_tokens: int = 64,
    *,
    shard_tokens: int = 1 << 20,
    manifest: Manifest | None = None,
) -> Corpus:
    """A corpus of these documents, as many to a shard as fit."""
    with writing(folder, manifest or manifest_of(num_tokens), shard_tokens=shard_tokens) as writer:
        for number, tokens in enumerate(documents):
            writer.add(Document.complete(f"d{number}", f"{number}", int_array(list(tokens))))
        writer.publish(["test"])
    return open_corpus(f"{folder}/")
