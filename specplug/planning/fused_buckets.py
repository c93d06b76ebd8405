"""The buckets of several proposers whose drafts are merged, as one table.

A single proposer keeps its own. With several, each bucket exists twice: "alone", and "agreed" for draft tokens that
another proposer drafted at the same place. Beside a model-based proposer, the others have a few more for tokens that
the model has judged. A proposer for constrained sequences changes none of this: most sequences have no constraint, and
what it drafts is as likely whoever agrees. It does not depend on how drafts are merged.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass

import numpy as np

from specplug.core import Bucket, IntArray
from specplug.planning.constants import AGREED_ODDS, ALONE_ODDS, JUDGED_EDGES, JUDGED_ODDS, JUDGED_TOP, LIKELY_PRIOR

BANDS = (
    f"{JUDGED_EDGES[0]:g}-1",
    *(f"{low:g}-{high:g}" for high, low in zip(JUDGED_EDGES, (*JUDGED_EDGES[1:], 0.0), strict=True)),
    f"outside of the top {JUDGED_TOP}",
)
"""The names of the bands of `judgement.band_of`."""


@dataclass(frozen=True, slots=True, eq=False)
class FusedBuckets:
    """
    buckets  all of them: those of the first proposer, then those of the second, and so on; those of judged tokens last
    firsts   per proposer, the index of its first bucket; its buckets of agreement follow all its other ones
    source   int32[buckets], the index of the proposer that each bucket belongs to
    own      per proposer, the buckets of draft tokens that no other proposer drafted
    agreed   per bucket, the one of a token that another proposer drafted, too
    judged   per band, the bucket of a judged token by the one that it would have if it were not judged
    """

    buckets: tuple[Bucket, ...]
    firsts: tuple[int, ...]
    source: IntArray
    own: tuple[frozenset[int], ...]
    agreed: tuple[int, ...]
    judged: tuple[dict[int, int], ...]


def fused_buckets(
    each: Sequence[Sequence[Bucket]],
    names: Sequence[str],
    models: Set[int] = frozenset(),
    constrained: Set[int] = frozenset(),
) -> FusedBuckets:
    """The table for proposers with these buckets and names; equal names get their index.

    models       the model-based proposers, by index, which judge the drafts of the others
    constrained  those that draft for sequences with a constraint only: they have each bucket once
    """
    if len(each) == 1:
        every = range(len(each[0]))
        source = np.zeros(len(every), np.int32)
        return FusedBuckets(tuple(each[0]), (0,), source, (frozenset(every),), tuple(every), ())
    buckets: list[Bucket] = []
    sources: list[int] = []
    alone: list[set[int]] = [set() for _ in each]
    agreed: list[int] = []

    def add(index: int, single: Sequence[Bucket], shared: Sequence[Bucket]) -> int:
        """Add buckets of one proposer, then those of agreement: one for each of them, or one for all. Returns the index
        of the first."""
        first = len(buckets)
        together = range(first + len(single), first + len(single) + len(shared))
        buckets.extend((*single, *shared))
        sources.extend([index] * (len(single) + len(shared)))
        alone[index].update(range(first, together.start))
        if not shared:
            agreed.extend(range(first, together.start))
        else:
            agreed.extend((*(together if len(shared) == len(single) else [together.start] * len(single)), *together))
        return first

    names = [name if list(names).count(name) == 1 else f"{name} {index}" for index, name in enumerate(names)]
    only = len(each) - len(constrained) == 1

    def add_own(index: int, name: str, own: Sequence[Bucket]) -> int:
        if index in constrained:
            return add(index, [Bucket(f"{name} {one.name}", one.prior) for one in own], ())
        if only:  # as without the others
            return add(index, own, ())
        return add(
            index,
            [Bucket(f"{name} {one.name}", _with_odds(one.prior, ALONE_ODDS)) for one in own],
            [Bucket(f"{name} {one.name}, agreed", _with_odds(one.prior, AGREED_ODDS)) for one in own],
        )

    firsts = tuple(add_own(index, name, own) for index, (name, own) in enumerate(zip(names, each, strict=True)))
    judged: list[dict[int, int]] = [{} for _ in BANDS]
    for index, (name, own) in enumerate(zip(names, each, strict=True)):
        if not models or only or index in models or index in constrained or not own:
            continue
        likely = {place for place, one in enumerate(own) if one.prior >= LIKELY_PRIOR}
        groups = {"unlikely": {*range(len(own))} - likely, "likely": likely}
        groups = {which: places for which, places in groups.items() if places}
        for band, odds in enumerate(JUDGED_ODDS):
            single = [
                Bucket(f"{name} {which}, judged {BANDS[band]}", _mean_with_odds([own[i] for i in places], odds))
                for which, places in groups.items()
            ]
            shared = Bucket(f"{name} agreed, judged {BANDS[band]}", _mean_with_odds(own, odds * AGREED_ODDS))
            first = add(index, single, [shared])
            for bucket, places in enumerate(groups.values(), start=first):
                judged[band].update((firsts[index] + place, bucket) for place in places)
    own_buckets = tuple(map(frozenset, alone))
    return FusedBuckets(
        tuple(buckets), firsts, np.asarray(sources, np.int32), own_buckets, tuple(agreed), tuple(judged)
    )


def _mean_with_odds(buckets: Collection[Bucket], factor: float) -> float:
    return sum(_with_odds(bucket.prior, factor) for bucket in buckets) / len(buckets)


def _with_odds(prior: float, factor: float) -> float:
    """The prior with its odds multiplied."""
    return factor * prior / (1.0 + (factor - 1.0) * prior)
