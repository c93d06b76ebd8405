"""Counts verified and accepted draft tokens, by proposer and by depth in the draft."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.engines.llama_cpp.tree_batch import Tree

DEPTHS = 16
"""Depths that are counted separately; deeper tokens are counted at the last one."""


class DraftCounts:
    """State: two lists of DEPTHS integers per proposer, and the number of drafts."""

    def __init__(self, num_proposers: int) -> None:
        self.drafts = 0
        self._verified = [[0] * DEPTHS for _ in range(num_proposers)]
        self._accepted = [[0] * DEPTHS for _ in range(num_proposers)]

    @property
    def verified(self) -> npt.NDArray[np.int64]:
        """int64[proposers, DEPTHS]"""
        return np.array(self._verified, dtype=np.int64)

    @property
    def accepted(self) -> npt.NDArray[np.int64]:
        """int64[proposers, DEPTHS]"""
        return np.array(self._accepted, dtype=np.int64)

    def add(self, tree: Tree, proposer_of: IntArray) -> list[int]:
        """Count a verified draft. `proposer_of` maps buckets to proposers; returns that of each accepted token."""
        self.drafts += 1
        owners = proposer_of[tree.draft.buckets].tolist()
        depths = [min(depth, DEPTHS) - 1 for depth in tree.draft.depths().tolist()]
        for proposer, depth in zip(owners, depths, strict=True):
            self._verified[proposer][depth] += 1
        for node in tree.accepted:
            self._accepted[owners[node]][depths[node]] += 1
        return [owners[node] for node in tree.accepted]
