"""Tiny models that count, and heads that know it: what is drafted right follows from how they are made.

The tokens of a cycle have embeddings on a circle in many planes. Their layers add nothing, and the output matrix finds
the next token of the cycle. A head turns a state by one place, which is a linear map, and so knows it as well as the
model does, from the model's states alone.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_architectures import eagle3, llama, qwen35
from tiny_gguf import NUM_TOKENS, WIDTH

FIRST = 300
"""The first token of the cycle; the others have the next numbers."""

DECOYS = 1400
"""The first of the tokens that a head drafts in place of hidden ones. They are not in the cycle."""

NO_LAYER: dict[str, Any] = {"attn_output.weight": 0.0, "ffn_down.weight": 0.0}
"""A layer that adds nothing."""

Matrix = npt.NDArray[np.float64]


def hidden_tokens(length: int, share: float) -> list[int]:
    """This share of the cycle, at random places."""
    return [FIRST + place for place in np.flatnonzero(np.random.default_rng(4).random(length) < share).tolist()]


def place_of(token: int, length: int) -> int:
    """The place of a token in the cycle."""
    assert FIRST <= token < FIRST + length
    return token - FIRST


def next_tokens(token: int, count: int, length: int) -> list[int]:
    """The tokens that follow one in the cycle."""
    return [FIRST + (place_of(token, length) + step) % length for step in range(1, count + 1)]


def counting_llama(path: Path, *, length: int = 1000) -> Path:
    """A model with attention that continues the cycle of so many tokens; after any other token it enters it."""
    return llama(path, given=_target(length))


def counting_qwen35(path: Path, *, length: int = 1000, hidden: Collection[int] = ()) -> Path:
    """As `counting_llama`, a hybrid model with an MTP layer.

    hidden  tokens of the cycle that the MTP layer does not draft first, but as the second most likely ones
    """
    given = _target(length) | {"nextn.shared_head_head.weight": _outputs(length, hidden)}
    given["nextn.eh_proj.weight"] = np.concatenate([np.zeros((WIDTH, WIDTH)), _turn(length)], axis=1)
    given |= dict.fromkeys(("nextn.hnorm.weight", "nextn.shared_head_norm.weight"), 1.0)
    return qwen35(path, mtp_layers=1, own_output=True, given=given)


def counting_eagle3(path: Path, *, length: int = 1000, hidden: Collection[int] = ()) -> Path:
    """A head for `counting_llama`; `hidden` as for `counting_qwen35`.

    Its attention sees its own row alone, since the cosine between two rows is far from 1, and adds to the state what
    turns it.
    """
    given = {
        "fc.weight": np.tile(np.eye(WIDTH) / 3, (1, 3)),
        "attn_norm_2.weight": 1.0,
        "ffn_down.weight": 0.0,
        "output_norm.weight": 1.0,
        "attn_q.weight": _of_state(np.eye(WIDTH) * 60),
        "attn_k.weight": _of_state(np.eye(WIDTH)),
        "attn_v.weight": _of_state(_turn(length) - np.eye(WIDTH)),
        "attn_output.weight": np.eye(WIDTH),
        "output.weight": _outputs(length, hidden),
    }
    return eagle3(path, norm_before_residual=True, given=given)


def _target(length: int) -> dict[str, Any]:
    embeddings = np.random.default_rng(2).normal(0, 1, (NUM_TOKENS, WIDTH))
    embeddings[FIRST : FIRST + length] = _circle(length)
    return NO_LAYER | {
        "ssm_out.weight": 0.0,
        "token_embd.weight": embeddings,
        "output_norm.weight": 1.0,
        "output.weight": _outputs(length),
    }


def _frequencies(length: int) -> Matrix:
    """Radians per place, in each plane; every one of them closes the circle after `length` places."""
    turns = np.random.default_rng(1).integers(1, length, WIDTH // 2)
    return 2 * np.pi * turns / length


def _circle(length: int) -> Matrix:
    """float64[length, WIDTH]: the embeddings of the cycle, with a mean square of 1."""
    angles = np.arange(length)[:, None] * _frequencies(length)
    return np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], axis=2).reshape(length, WIDTH)


def _turn(length: int) -> Matrix:
    """float64[WIDTH, WIDTH]: the matrix, as it is stored, that makes the next embedding of one."""
    turn = np.zeros((WIDTH, WIDTH))
    for plane, angle in enumerate(_frequencies(length)):
        at = slice(2 * plane, 2 * plane + 2)
        turn[at, at] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


def _of_state(matrix: Matrix) -> Matrix:
    """A matrix over the embedding and the state of an EAGLE-3 head that reads the state alone."""
    return np.concatenate([np.zeros((WIDTH, WIDTH)), matrix], axis=1)


def _outputs(length: int, hidden: Collection[int] = ()) -> Matrix:
    """float64[NUM_TOKENS, WIDTH]: finds the next token of the cycle; before each that is hidden, a decoy."""
    outputs = np.zeros((NUM_TOKENS, WIDTH))
    outputs[FIRST : FIRST + length] = np.roll(_circle(length), 1, axis=0)
    places = [place_of(token, length) for token in hidden]
    decoys = DECOYS + np.arange(len(places))
    outputs[decoys] = 1.05 * outputs[FIRST : FIRST + length][places]
    assert not len(decoys) or decoys[-1] < NUM_TOKENS - 2
    return outputs
