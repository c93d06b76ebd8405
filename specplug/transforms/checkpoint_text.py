"""Tokenizes text with the tokenizer.json of a checkpoint, through the library `tokenizers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from specplug.core import IntArray
from specplug.errors import EngineError, UsageError


def tokenize(folder: Path, texts: Sequence[str]) -> list[IntArray]:
    """The tokens of each text (int32[n]), without special tokens around it. EngineError without `tokenizers`."""
    return open_tokenizer(folder)(texts)


def open_tokenizer(folder: Path) -> Callable[[Sequence[str]], list[IntArray]]:
    """`tokenize` for one folder, which is read once."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EngineError(f"{folder}: reading text needs tokenizers ({error}): pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception, whatever is wrong
        raise UsageError(f"{folder / 'tokenizer.json'}: cannot be read ({error}); name a complete model") from None

    def tokens_of(texts: Sequence[str]) -> list[IntArray]:
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    return tokens_of
