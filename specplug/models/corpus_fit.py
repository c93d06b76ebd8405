"""The check that a corpus was made for the tokenizer of a model."""

from __future__ import annotations

from pathlib import Path

from specplug.corpora.folder import check_tokenizer, place, read_manifest
from specplug.models.references import tokenizer_hash, vocabulary_size


def check_fits(ref: str, model: Path) -> None:
    """UsageError unless the corpus was made with the tokenizer of `model` and holds ids of its vocabulary alone.

    model  a GGUF file or a folder
    """
    check_tokenizer(read_manifest(place(ref), ref), ref, tokenizer_hash(model), vocabulary_size(model), model)
