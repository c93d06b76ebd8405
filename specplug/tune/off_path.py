"""Evaluates tokens that the target did not choose, on llama.cpp: replay needs the rows after rejected draft tokens.

Works on an open context and one recorded answer; does not depend on how answers are recorded or replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from specplug.core import IntArray, int_array
from specplug.generation.topk import top_ids
from specplug.tune.trace import ALONE, Answer, OffPathRows

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.context import Context

RUNNERS_UP = 3
"""Ids that rank below the target's choice and are evaluated at every position: each alone, and followed by the id that
the target ranks first after it."""

OFF_PATH_IDS = 64
"""Off-path rows that are evaluated in one pass, each with a sequence id of its own."""


def off_path_rows(context: Context, answer: Answer) -> OffPathRows | None:
    """The rows after the runners-up of every position, and after each runner-up and its most likely next token."""
    own, k = answer.tokens, answer.topk.shape[1]
    off_path = [
        (at, token)
        for at in range(len(answer.topk))
        for token in answer.topk[at, : RUNNERS_UP + 1].tolist()
        if token != own[at + 1]
    ]
    if not off_path:
        return None
    context.clear()
    text = np.concatenate((answer.prompt, own))
    for start in range(0, len(text), context.num_batch):
        context.clear_batch()
        context.add_span(text[start : start + context.num_batch], start, 0, wanted=False, last=True)
        context.decode()
    rows: list[tuple[int, tuple[int, int], IntArray]] = []
    for start in range(0, len(off_path), OFF_PATH_IDS):
        part = off_path[start : start + OFF_PATH_IDS]
        place = [len(answer.prompt) + at + 1 for at, _ in part]  # of the token, in prompt and answer
        for leaf, position in enumerate(place, start=1):
            context.copy(0, leaf, 0, position)
        first = _pass(context, [token for _, token in part], place, k)
        following: list[int] = first[:, 0].tolist()
        second = _pass(context, following, [position + 1 for position in place], k)
        for leaf in range(1, len(part) + 1):
            context.drop(leaf)
        for (at, token), follower, one, two in zip(part, following, first, second, strict=True):
            rows += [(at, (token, ALONE), one), (at, (token, follower), two)]
    return OffPathRows(
        int_array([at for at, _, _ in rows]),
        np.array([path for _, path, _ in rows], dtype=np.int32),
        np.stack([top for _, _, top in rows]),
    )


def _pass(context: Context, tokens: Sequence[int], positions: Sequence[int], k: int) -> IntArray:
    """Evaluate one token for each sequence id from 1 on; returns the top ids after each, int32[n, k]."""
    context.clear_batch()
    for leaf, (token, position) in enumerate(zip(tokens, positions, strict=True), start=1):
        context.add(token, position, (leaf,))
    context.decode()
    return top_ids(context.logits(len(tokens)), k)
