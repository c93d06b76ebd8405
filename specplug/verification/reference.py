"""The reference verification rules: short and slow, the oracle that the engines are tested against.

They work on trees and probability vectors and do not depend on an engine or its samplers.
Source: tree verification by the target's own samples (SpecInfer, arXiv 2305.09781, for deterministic drafts); rejection
sampling (Leviathan et al., arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from specplug.core import ROOT, Draft, FloatArray


def verify_tree(draft: Draft, pick: Callable[[int], int]) -> tuple[list[int], list[int]]:
    """The emitted tokens and the accepted nodes, where `pick(node)` is the target's own next token after `node`.

    `pick` is called once per emitted token in emission order, first with ROOT, so that plain and speculative decoding
    use the same random numbers.
    """
    child = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True))
    }
    emitted: list[int] = []
    accepted: list[int] = []
    current = ROOT
    while True:
        token = pick(current)
        emitted.append(token)
        found = child.get((current, token))
        if found is None:
            return emitted, accepted
        accepted.append(found)
        current = found


def verify_chain_by_rejection(
    tokens: Sequence[int], draft_probs: FloatArray, target_probs: FloatArray, uniform: Callable[[], float]
) -> list[int]:
    """The emitted tokens for a chain that was sampled from a drafter's distribution.

    draft_probs  float64[n, V]      row i: the distribution that tokens[i] was sampled from
    target_probs float64[n + 1, V]  row i: the target's distribution after tokens[:i]
    uniform      returns a random number from [0, 1); it is called at most twice per position
    """
    emitted: list[int] = []
    for i, token in enumerate(tokens):
        p, q = target_probs[i], draft_probs[i]
        if uniform() * q[token] < p[token]:
            emitted.append(int(token))
            continue
        residual = np.maximum(p - q, 0.0)
        emitted.append(_draw(residual / residual.sum(), uniform))
        return emitted
    emitted.append(_draw(target_probs[len(tokens)], uniform))
    return emitted


def _draw(probs: FloatArray, uniform: Callable[[], float]) -> int:
    cumulative = np.cumsum(probs)
    return int(min(np.searchsorted(cumulative, uniform() * cumulative[-1], side="right"), len(probs) - 1))
