"""How often draft tokens of each bucket are accepted.

This module counts hits and misses per bucket; it does not depend on costs, engines or proposers.
Source: decayed counts as in DEL (arXiv 2504.05598, omega = 0.95); here they are kept per bucket and start from a prior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specplug.core import ROOT, Bucket, Draft
from specplug.planning.constants import ACCEPTANCE_DECAY, MIN_KEPT_OBSERVATIONS, PRIOR_WEIGHT


class AcceptanceTable:
    """P(node accepted | parent accepted) per bucket.

    State: two counts and one probability per bucket.
    """

    def __init__(self, buckets: Sequence[Bucket], learned: Mapping[str, Sequence[float]] | None = None) -> None:
        """`learned` maps bucket names to (hits, misses), as stored in a profile; unknown names are ignored."""
        self.buckets = tuple(buckets)
        self.hits = [PRIOR_WEIGHT * bucket.prior for bucket in self.buckets]
        self.misses = [PRIOR_WEIGHT * (1 - bucket.prior) for bucket in self.buckets]
        for i, bucket in enumerate(self.buckets):
            if learned and bucket.name in learned:
                hits, misses = learned[bucket.name]
                self.hits[i] += hits
                self.misses[i] += misses
        self.probability = [h / (h + m) for h, m in zip(self.hits, self.misses, strict=True)]

    def learn(self, draft: Draft, emitted: Sequence[int]) -> int:
        """Count every node whose parent agrees with the emitted tokens, verified or not; returns the agreeing depth."""
        tokens, parents, buckets = draft.tokens.tolist(), draft.parents.tolist(), draft.buckets.tolist()
        current, depth = ROOT, 0
        for token in emitted:
            matching = ROOT
            for node in range(current + 1, len(tokens)):
                if parents[node] == current:
                    hit = tokens[node] == token
                    self.count(buckets[node], int(hit), int(not hit))
                    if hit:
                        matching = node
            if matching == ROOT:
                break
            current = matching
            depth += 1
        return depth

    def learned(self) -> dict[str, tuple[float, float]]:
        """(hits, misses) beyond the prior, by bucket name, to store in a profile; without rarely seen buckets."""
        counts = {}
        for bucket, hits, misses in zip(self.buckets, self.hits, self.misses, strict=True):
            hits -= PRIOR_WEIGHT * bucket.prior
            misses -= PRIOR_WEIGHT * (1 - bucket.prior)
            if hits + misses > MIN_KEPT_OBSERVATIONS:
                counts[bucket.name] = (max(hits, 0.0), max(misses, 0.0))
        return counts

    def count(self, bucket: int, hits: int, misses: int) -> None:
        """Add hits and misses of one bucket; those of one call have the same age."""
        kept = ACCEPTANCE_DECAY ** (hits + misses)
        self.hits[bucket] = self.hits[bucket] * kept + hits
        self.misses[bucket] = self.misses[bucket] * kept + misses
        self.probability[bucket] = self.hits[bucket] / (self.hits[bucket] + self.misses[bucket])
