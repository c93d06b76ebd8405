"""Prompts for fill-in-the-middle: the tokens with which a model marks the parts, and their order.

Works on tokens, and does not depend on an engine. Source: arXiv 2207.14255 for the two orders, arXiv 2409.12186 for the
files of a repository; the shares of prefix and suffix, and the text between files, are those of llama-server
(`format_prompt_infill` in tools/server of github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from specplug.core import IntArray, int_array

WINDOW = 2048
"""Tokens of prefix and suffix together at most, as in llama-server with its default batch size."""

PREFIX_SHARE = 4
"""One part of this many goes to the suffix, the others to the prefix."""

PROJECT = "myproject"
FILE = "filename"
"""Names that stand for the repository and the file, which a request does not tell."""

SNIPPET = "\n\n--- snippet ---\n\n"
"""Stands before the text of another file where a model has no token for that."""


@dataclass(frozen=True, slots=True)
class FillInTokens:
    """A model's ids: of the marks before prefix, suffix and the middle; before the name of a repository and of a file,
    and at the beginning of a text, where it has them."""

    prefix: int
    suffix: int
    middle: int
    repository: int | None = None
    file: int | None = None
    begin: int | None = None


@dataclass(frozen=True, slots=True)
class OtherFile:
    """A text that may help to fill in: part of another file, or of the clipboard."""

    text: str
    name: str


def in_order(
    marks: FillInTokens,
    prefix: IntArray | Sequence[int],
    suffix: IntArray | Sequence[int],
    *,
    suffix_first: bool,
    before: IntArray | Sequence[int] = (),
) -> IntArray:
    """int32[n]: the prompt after which a model writes what belongs between prefix and suffix.

    suffix_first  the order suffix, prefix, middle instead of prefix, suffix, middle
    before        tokens that stand before all of it
    """
    parts = [[marks.prefix, *prefix], [marks.suffix, *suffix]]
    first, second = parts[::-1] if suffix_first else parts
    begin = [marks.begin] if marks.begin is not None else []
    return int_array([*before, *begin, *first, *second, marks.middle])


def other_files(marks: FillInTokens, files: Sequence[OtherFile], tokenize: Callable[[str], IntArray]) -> IntArray:
    """int32[n]: other files, and where a model has such marks, the names of repository and file.

    tokenize  without tokens around a text, and without control tokens in it
    """
    tokens: list[int] = []
    if marks.repository is not None:
        tokens += [marks.repository, *tokenize(f"{PROJECT}\n")]
    for file in files:
        if marks.file is not None:
            tokens += [marks.file, *tokenize(f"{file.name}\n")]
        else:
            tokens += tokenize(SNIPPET).tolist()
        tokens += tokenize(file.text).tolist()
    if marks.file is not None:
        tokens += [marks.file, *tokenize(f"{FILE}\n")]
    return int_array(tokens)


def fitted(
    prefix: IntArray, prompt: IntArray, suffix: IntArray, extra: IntArray, *, context: int, answer: int
) -> tuple[IntArray, IntArray, IntArray]:
    """The parts that fit: the end of the prefix with all of `prompt` after it, the beginning of the suffix, and the end
    of what stands before both.

    context  tokens of prompt and answer at most
    answer   tokens of the answer at most
    """
    room = max(0, context - answer - 4)  # three marks, and the token at the beginning
    window = min(WINDOW, room)
    quarter = window // PREFIX_SHARE
    kept_prefix = min(len(prefix), (PREFIX_SHARE - 1) * quarter)
    kept_suffix = min(len(suffix), max(0, quarter - (2 + len(prompt))))
    kept_extra = min(len(extra), max(0, room - kept_prefix - len(prompt) - kept_suffix))
    whole = np.concatenate([prefix[len(prefix) - kept_prefix :], prompt])
    return int_array(whole), suffix[:kept_suffix], extra[len(extra) - kept_extra :]
