"""Counts how often each token occurs, for choosing the rows of a trimmed head, and holds out documents to evaluate it.

Source: VocabTrim (arXiv 2506.22694): the target's own completions predict best, so completions are counted and
prompts are not. The module does not depend on an engine; apart from text files it does not read the documents itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.transforms.kept_ids import Counts

SIZE_LIMIT = 256 << 20
"""Bytes of a text file at most. A far smaller file suffices to choose the rows of a head."""

PIECE = 4096
"""Characters of a document of raw text at most; a file is cut at line ends."""

HELD_OUT_SHARE, MIN_HELD_OUT = 10, 4
"""One document in HELD_OUT_SHARE is held out, but at least MIN_HELD_OUT of them, and never more than half."""


@dataclass(frozen=True, slots=True, eq=False)
class Frequencies:
    """Token counts, int64[V] each.

    calibration     counts over the documents that the rows are chosen by
    held_out        counts over the held-out documents, which evaluate the choice
    held_out_names  names of the held-out documents
    """

    calibration: Counts
    held_out: Counts
    held_out_names: frozenset[str]
    num_documents: int


def count(documents: Mapping[str, Sequence[IntArray]], num_tokens: int) -> Frequencies:
    """Count the tokens of named documents, each a list of parts. UsageError for fewer than two, or without tokens."""
    if len(documents) < 2:
        raise UsageError(f"{len(documents)} document(s) to count: at least 2 are needed, because one is held out")
    names = held_out(list(documents))
    counts = {side: np.zeros(num_tokens, dtype=np.int64) for side in (False, True)}
    for name, parts in documents.items():
        for part in parts:
            counts[name in names] += np.bincount(part, minlength=num_tokens)
    if not counts[False].any():
        raise UsageError("nothing was counted: the documents hold no tokens; calibrate on other text")
    return Frequencies(counts[False], counts[True], names, len(documents))


def held_out(names: Sequence[str]) -> frozenset[str]:
    """The names of the documents to hold out, chosen by a hash of the name.

    The order of the documents does not change the choice, and a new document replaces at most one.
    """
    number = min(max(len(names) // HELD_OUT_SHARE, MIN_HELD_OUT), len(names) // 2)
    return frozenset(sorted(names, key=lambda name: sha256(name.encode("utf-8", "replace")).digest())[:number])


def read_text(path: Path) -> list[str]:
    """The pieces of a text file; see `pieces`. UsageError for a file that cannot be used."""
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE_LIMIT + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UsageError(f"--calibrate {os.fspath(path)!r}: cannot be read ({error}); name a file, or self") from None
    if len(content) > SIZE_LIMIT:
        raise UsageError(f"--calibrate {path}: larger than {SIZE_LIMIT >> 20} MiB; use a part of it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--calibrate {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise UsageError(f"--calibrate {path}: holds no text; name another file, or self")
    return pieces(text, min(PIECE, max(1, len(text) // (2 * MIN_HELD_OUT))))


def pieces(text: str, max_chars: int) -> list[str]:
    """The text in pieces of at most `max_chars` characters, cut at line ends where possible."""
    parts: list[str] = []
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), max_chars):
            part = line[start : start + max_chars]
            if parts and len(parts[-1]) + len(part) <= max_chars:
                parts[-1] += part
            else:
                parts.append(part)
    return parts
