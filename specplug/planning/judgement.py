"""What a model-based proposer finds likely at the places of its draft, by which other drafts' tokens there are judged.

Works on tokens and probabilities, and does not depend on buckets or on how drafts are merged.
Source: RASD (arXiv 2503.03434) drops a retrieved path unless its first token is among the draft model's top ids at the
root; that rule is `prune_top_k`. Judging later tokens, and by bands, is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specplug.core import ROOT, Draft, Likeliest
from specplug.planning.constants import JUDGED_EDGES

DROPPED = -2
"""Stands for the band of a token that is dropped, and for a node that is not merged."""

OUTSIDE = len(JUDGED_EDGES) + 1
"""The band of tokens that are not among the likeliest ones."""


class Judgement:
    """The judgement of one proposer about draft tokens of others, for one sequence in one step."""

    def __init__(
        self,
        draft: Draft,
        places: Sequence[Likeliest],
        knows: Callable[[int], bool],
        prune_top_k: int | None = None,
    ) -> None:
        """
        draft        its draft
        places       its likeliest tokens at the root, then after each token of its chain
        knows        whether it can draft a token
        prune_top_k  drop tokens at the root that are not among so many of the likeliest; None drops none
        """
        self._likely = [dict(zip(one.tokens.tolist(), one.probabilities.tolist(), strict=True)) for one in places]
        self._kept = None if prune_top_k is None else {*places[0].tokens[:prune_top_k].tolist()}
        self._knows = knows
        self._drafted: list[list[int]] = []
        """Per place, the tokens that it drafted, of which the first one is in its chain."""
        last = ROOT
        tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
        for _ in places:
            children = [node for node, parent in enumerate(parents) if parent == last]
            self._drafted.append([tokens[node] for node in children])
            last = children[0] if children else len(tokens)

    def of(self, place: int | None, token: int) -> tuple[int | None, int | None]:
        """The band of a token at a place, and the place that follows it.

        The band is None where it drafted the token itself, and where it says nothing: of tokens that it cannot draft,
        and where the place is None.
        """
        if place is None or place >= len(self._likely):
            return None, None
        drafted = self._drafted[place]
        if token in drafted:
            return None, place + 1 if token == drafted[0] else None
        if not self._knows(token):
            return None, None
        if self._kept is not None and place == 0 and token not in self._kept:
            return DROPPED, None
        return band_of(self._likely[place].get(token)), None


def band_of(probability: float | None) -> int:
    """The band of a token by its probability; None for one that is not among the likeliest. The likeliest is 0."""
    return OUTSIDE if probability is None else sum(probability < edge for edge in JUDGED_EDGES)
