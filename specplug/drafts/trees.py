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


def likeliest_path(parents: Sequence[int], line: Sequence[float]) -> list[int]:
    """The nodes of the root-to-leaf path with the largest sum of `line`, which is a value per node."""
    total: list[float] = []
    for node, parent in enumerate(parents):
        total.append(line[node] + (0.0 if parent == ROOT else total[parent]))
    path: list[int] = []
    node = max(range(len(total)), key=total.__getitem__) if total else ROOT
    while node != ROOT:
        path.append(node)
        node = parents[node]
    path.reverse()
    return path
