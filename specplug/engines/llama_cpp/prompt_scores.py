"""The log probabilities of a prompt's own tokens, from passes in which all of its rows have logits.

Limits such rows to those for which the context has room, so that a long prompt takes several passes and no more memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from specplug.engines.llama_cpp.context import Logits
from specplug.engines.llama_cpp.sampling import token_logprobs
from specplug.engines.llama_cpp.stream import Piece, Stream


def scored_rows(reading: Sequence[Stream], given: Sequence[int], room: int) -> list[tuple[Stream, int]]:
    """The prompts that get rows in a pass, and how many, where prompt i was given `given[i]` of them.

    room  rows with logits that the pass can still have; each prompt that is not scored takes one, at its end
    """
    left = room - sum(rows > 0 and stream.top_of_prompt is None for stream, rows in zip(reading, given, strict=True))
    chosen = []
    for stream, rows in zip(reading, given, strict=True):
        if stream.top_of_prompt is not None:
            rows = min(rows, left)
            left -= rows
        if rows > 0:
            chosen.append((stream, rows))
    return chosen


def add_scores(piece: Piece, logits: Logits) -> None:
    """Add to a stream the log probabilities of the prompt's tokens that follow those of a piece.

    logits  float32[rows, V]: those of the piece
    """
    stream, top = piece.stream, piece.stream.top_of_prompt
    if top is None:
        return
    done = 1 + len(stream.prompt_logprobs)
    following = stream.prompt[done : done + len(piece.tokens)].tolist()
    for row, token in enumerate(following):
        stream.prompt_logprobs.append(token_logprobs(logits[row], token, top))
