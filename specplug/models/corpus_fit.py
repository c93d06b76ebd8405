"""The check that a corpus was made for the tokenizer of a model."""

from __future__ import annotations

from pathlib import Path

from specplug.corpora.folder import place, read_manifest
from specplug.errors import UsageError
from specplug.models.references import tokenizer_hash, vocabulary_size


def check_fits(ref: str, model: Path) -> None:
    """UsageError unless the corpus was made with the tokenizer of `model` and holds ids of its vocabulary alone.

    model  a GGUF file or a folder
    """
    manifest, tokenizer = read_manifest(place(ref), ref), tokenizer_hash(model)
    if manifest.tokenizer != tokenizer:
        raise UsageError(
            f"corpus {ref}: its tokenizer is {manifest.tokenizer[:12]}, that of {model} {tokenizer[:12]}; build a "
            "corpus with this model"
        )
    num_tokens = vocabulary_size(model)
    if num_tokens is not None and manifest.num_tokens > num_tokens:
        raise UsageError(
            f"corpus {ref}: its vocabulary has {manifest.num_tokens} tokens, that of {model} {num_tokens}; build a "
            "corpus with this model"
        )
