"""Greedy replay of a proposer over a text that the target is known to emit.

Source: the tree walk is greedy tree verification (SpecInfer, arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specplug.core import ROOT, Draft, IntArray, Proposer, Step, int_array
from specplug.verification.reference import verify_tree

TopK = Callable[[Sequence[int]], IntArray]
"""Returns the target's most likely next ids (int32[k], most likely first) after a context."""

_PAST_THE_END = -1
"""Stands for the target's next token after the end of the known text; no draft token equals it."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The steps of a replay, and the text that they emitted."""

    steps: list[Step]
    emitted: list[int]

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target pass, including the target's own token: plain decoding is 1.00."""
        return len(self.emitted) / len(self.steps) if self.steps else 0.0

    def bucket_counts(self, num_buckets: int) -> npt.NDArray[np.int64]:
        """int64[num_buckets, 2]: the number of nodes whose parent was accepted, and of those that were accepted too."""
        counts = np.zeros((num_buckets, 2), dtype=np.int64)
        for step in self.steps:
            reached = {ROOT, *step.accepted}
            for node, (parent, bucket) in enumerate(
                zip(step.draft.parents.tolist(), step.draft.buckets.tolist(), strict=True)
            ):
                if parent in reached:
                    counts[bucket] += (1, node in reached)
        return counts


def replay(
    proposer: Proposer,
    prompt: Sequence[int] | IntArray,
    continuation: Sequence[int],
    budget: int,
    topk: TopK | None = None,
    *,
    seq: int = 0,
) -> ReplayResult:
    """Drive `proposer` from `begin` to `end`, as an engine would, over a text that the target is known to emit.

    prompt        the tokens before the text; the last one is the first root
    continuation  the text
    budget        most nodes per draft
    topk          for a proposer that requires top ids, as `lambda tokens: target.topk(tokens, 8)`
    """
    assert topk is not None or proposer.requires.topk == 0, "this proposer requires the target's top ids: pass `topk`"
    context = [int(token) for token in prompt]
    proposer.begin(seq, int_array(context))
    steps: list[Step] = []
    emitted: list[int] = []
    while len(emitted) < len(continuation):
        draft = proposer.propose(seq, budget)
        step = verify_known(draft, continuation[len(emitted) :], context, topk)
        context += step.emitted
        proposer.observe(seq, step)
        steps.append(step)
        # After `observe`, so that a proposer which writes into its Step changes the text and is found.
        emitted += step.emitted
    proposer.end(seq)
    return ReplayResult(steps, emitted)


def verify_known(
    draft: Draft, continuation: Sequence[int], context: Sequence[int] = (), topk: TopK | None = None
) -> Step:
    """The Step of verifying `draft`, if the target is known to emit `continuation` (n >= 1) after `context`."""
    known = iter([*(int(token) for token in continuation), _PAST_THE_END])
    emitted, accepted = verify_tree(draft, lambda _: next(known))
    if emitted[-1] == _PAST_THE_END:
        emitted.pop()
    return Step(emitted, draft, accepted, None if topk is None else _topk_rows(draft, context, topk))


def _topk_rows(draft: Draft, context: Sequence[int], topk: TopK) -> IntArray:
    paths: list[list[int]] = [list(context)]
    for parent, token in zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True):
        paths.append([*paths[parent + 1], token])
    return int_array(np.stack([topk(path) for path in paths]))
