"""How often guesses of each bucket were right.

Knows counts. Knows neither trees beyond one walk nor costs.
Source: decayed hit and miss counts as in DEL (arXiv 2504.05598, omega = 0.95); ours are per bucket with a Beta prior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specplug.core import ROOT, Bucket, Draft

PRIOR_WEIGHT = 4.0
"""A bucket's prior counts as this many observations."""

DECAY = 0.99
"""What an old observation still counts when a new one of its bucket arrives: about the last 100 matter."""


class AcceptanceTable:
    """P(node accepted | parent accepted) per bucket.

    Keeps two floats and one probability per bucket.
    """

    def __init__(self, buckets: Sequence[Bucket], learned: Mapping[str, Sequence[float]] | None = None) -> None:
        """`learned` maps bucket names to (hits, misses), as a profile keeps them; unknown names are ignored."""
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
        """Score every guess whose parent came true, verified or not; returns the depth of agreement."""
        tokens, parents, buckets = draft.tokens.tolist(), draft.parents.tolist(), draft.buckets.tolist()
        current, depth = ROOT, 0
        for token in emitted:
            follow = ROOT
            for node in range(current + 1, len(tokens)):
                if parents[node] == current:
                    hit = tokens[node] == token
                    self.count(buckets[node], int(hit), int(not hit))
                    if hit:
                        follow = node
            if follow == ROOT:
                break
            current = follow
            depth += 1
        return depth

    def learned(self) -> dict[str, tuple[float, float]]:
        """(hits, misses) beyond the prior, by bucket name, for a profile; silent buckets left out."""
        found = {}
        for bucket, hits, misses in zip(self.buckets, self.hits, self.misses, strict=True):
            hits -= PRIOR_WEIGHT * bucket.prior
            misses -= PRIOR_WEIGHT * (1 - bucket.prior)
            if hits + misses > 0.5:
                found[bucket.name] = (max(hits, 0.0), max(misses, 0.0))
        return found

    def count(self, bucket: int, hits: int, misses: int) -> None:
        """Guesses of one bucket that were right and wrong; several at once count as alike old."""
        kept = DECAY ** (hits + misses)
        self.hits[bucket] = self.hits[bucket] * kept + hits
        self.misses[bucket] = self.misses[bucket] * kept + misses
        self.probability[bucket] = self.hits[bucket] / (self.hits[bucket] + self.misses[bucket])
