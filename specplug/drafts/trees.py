"""Calculations on token trees, from their parents and probabilities alone."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.core import ROOT


def path_probabilities(parents: Sequence[int], probabilities: Sequence[float]) -> list[float]:
    """P(node accepted) of each node, from its P(accepted | parent accepted)."""
    paths: list[float] = []
    for parent, p in zip(parents, probabilities, strict=True):
        paths.append(p if parent == ROOT else p * paths[parent])
    return paths


def likeliest(parents: Sequence[int], probabilities: Sequence[float], count: int) -> list[int]:
    """The `count` nodes of largest path probability, in order: a subtree, as no child is likelier than its parent."""
    paths = path_probabilities(parents, probabilities)
    ranked = sorted(range(len(paths)), key=lambda node: -paths[node])
    return sorted(ranked[:count])


def likeliest_path(parents: Sequence[int], values: Sequence[float]) -> list[int]:
    """The nodes of the root-to-leaf path with the largest sum of `values`, of which there is one per node."""
    total: list[float] = []
    for node, parent in enumerate(parents):
        total.append(values[node] + (0.0 if parent == ROOT else total[parent]))
    path: list[int] = []
    node = max(range(len(total)), key=total.__getitem__) if total else ROOT
    while node != ROOT:
        path.append(node)
        node = parents[node]
    path.reverse()
    return path


def first_branch(parents: Sequence[int]) -> list[int]:
    """The nodes from the root's first child down to a leaf, always by the first child."""
    branch: list[int] = []
    for node, parent in enumerate(parents):
        if parent == (branch[-1] if branch else ROOT):
            branch.append(node)
    return branch
