"""How often each token comes: what a trimmed head keeps is chosen by this, and judged by what was held out.

Knows documents as tokens. Knows neither an engine nor where a document comes from, files of text aside.
Source: VocabTrim (arXiv 2506.22694): the target's own completions tell best, and only completions count, not prompts.
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
"""Bytes of a text file. What a head needs to keep is settled by far less."""

PIECE = 4096
"""Characters of a document of raw text, or fewer: a file is cut at ends of lines."""

HELD_SHARE, HELD_FEWEST = 10, 4
"""Every so many-th document is held out, and of few ones so many, but never more than half."""


@dataclass(frozen=True, slots=True, eq=False)
class Frequencies:
    """Counts of tokens, int64[V] each.

    chosen_by  of the documents that the choice of rows may look at
    held_out   of the others, which tell how good the choice is
    held       names of the documents that are held out
    """

    chosen_by: Counts
    held_out: Counts
    held: frozenset[str]
    num_documents: int


def count(documents: Mapping[str, Sequence[IntArray]], num_tokens: int) -> Frequencies:
    """Count the tokens of named documents, each in parts. UsageError where there are fewer than two, or no tokens."""
    if len(documents) < 2:
        raise UsageError(f"{len(documents)} document(s) to count: at least 2 are needed, of which one is held out")
    held = held_out(list(documents))
    counts = {side: np.zeros(num_tokens, dtype=np.int64) for side in (False, True)}
    for name, parts in documents.items():
        for part in parts:
            counts[name in held] += np.bincount(part, minlength=num_tokens)
    if not counts[False].any():
        raise UsageError("nothing was counted: the documents hold no tokens; calibrate on other text")
    return Frequencies(counts[False], counts[True], held, len(documents))


def held_out(names: Sequence[str]) -> frozenset[str]:
    """Which documents are held out: by the hash of the name, so that neither order nor a new document moves many."""
    few = min(max(len(names) // HELD_SHARE, HELD_FEWEST), len(names) // 2)
    return frozenset(sorted(names, key=lambda name: sha256(name.encode("utf-8", "replace")).digest())[:few])


def read_text(path: Path) -> list[str]:
    """The pieces of a text file, see `pieces`. UsageError says what is wrong with it."""
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE_LIMIT + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UsageError(f"--calibrate {os.fspath(path)!r}: cannot be read ({error}); name a file, or self") from None
    if len(content) > SIZE_LIMIT:
        raise UsageError(f"--calibrate {path}: larger than {SIZE_LIMIT >> 20} MiB; a part of it is enough")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--calibrate {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise UsageError(f"--calibrate {path}: holds no text; name another file, or self")
    return pieces(text, min(PIECE, max(1, len(text) // (2 * HELD_FEWEST))))


def pieces(text: str, most: int) -> list[str]:
    """The text in pieces of at most `most` characters, cut at ends of lines where that goes."""
    found: list[str] = []
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), most):
            part = line[start : start + most]
            if found and len(found[-1]) + len(part) <= most:
                found[-1] += part
            else:
                found.append(part)
    return found
