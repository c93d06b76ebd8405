"""The buckets of several proposers whose drafts are merged, as one table.

A single proposer keeps its own. With several, each bucket exists twice: "alone", and "agreed" for draft tokens that
another proposer drafted at the same place. It does not depend on how drafts are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specplug.core import Bucket, IntArray
from specplug.planning.constants import AGREED_ODDS, ALONE_ODDS


@dataclass(frozen=True, slots=True, eq=False)
class FusedBuckets:
    """
    buckets  all of them: those of the first proposer, then those of the second, and so on
    firsts   per proposer, the index of its first bucket; its buckets of agreement follow all its other ones
    source   int32[buckets], the index of the proposer that each bucket belongs to
    own      per proposer, the buckets of draft tokens that no other proposer drafted
    """

    buckets: tuple[Bucket, ...]
    firsts: tuple[int, ...]
    source: IntArray
    own: tuple[frozenset[int], ...]


def fused_buckets(each: Sequence[Sequence[Bucket]], names: Sequence[str]) -> FusedBuckets:
    """The table for proposers with these buckets and names; equal names get their index."""
    buckets: list[Bucket] = []
    source: list[int] = []
    firsts: list[int] = []
    for index, own in enumerate(each):
        firsts.append(len(buckets))
        table = list(own)
        if len(each) > 1:
            name = names[index] if list(names).count(names[index]) == 1 else f"{names[index]} {index}"
            table = [Bucket(f"{name} {one.name}", _with_odds(one.prior, ALONE_ODDS)) for one in own]
            table += [Bucket(f"{name} {one.name}, agreed", _with_odds(one.prior, AGREED_ODDS)) for one in own]
        buckets += table
        source += [index] * len(table)
    alone = (frozenset(range(first, first + len(own))) for first, own in zip(firsts, each, strict=True))
    return FusedBuckets(tuple(buckets), tuple(firsts), np.asarray(source, dtype=np.int32), tuple(alone))


def _with_odds(prior: float, factor: float) -> float:
    """The prior with its odds multiplied."""
    return factor * prior / (1.0 + (factor - 1.0) * prior)
