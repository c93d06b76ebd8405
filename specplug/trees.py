"""Arithmetic on token trees.

Knows parents and probabilities. Knows no tokens and no costs.
"""

from __future__ import annotations

from collections.abc import Sequence

from specplug.core import ROOT


def path_probabilities(parents: Sequence[int], probabilities: Sequence[float]) -> list[float]:
    """P(node accepted) from each node's P(accepted | parent accepted)."""
    line: list[float] = []
    for parent, p in zip(parents, probabilities, strict=True):
        line.append(p if parent == ROOT else p * line[parent])
    return line


def likeliest(parents: Sequence[int], probabilities: Sequence[float], count: int) -> list[int]:
    """The `count` nodes of largest path probability, in order: a subtree, as no child is likelier than its parent."""
    line = path_probabilities(parents, probabilities)
    ranked = sorted(range(len(line)), key=lambda node: -line[node])
    return sorted(ranked[:count])
