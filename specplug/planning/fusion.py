"""Fusion: the drafts of several proposers merged into one tree.

It merges by buckets and the acceptance learned for them, and does not depend on how a proposer drafts.
Source: the tree fusion of RASD (arXiv 2503.03434), which inserts every path into the tree of the first proposer along
their longest common prefix. This one merges any number of trees of any shape, marks nodes that several proposers agree
on, and cuts by path probability. RASD drops retrieved paths by their first token; see `judgement.py`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from operator import itemgetter
from time import perf_counter_ns

import numpy as np

from specplug.core import (
    EMPTY,
    NO_OPTIONS,
    ROOT,
    BatchProposer,
    Configurable,
    Draft,
    IntArray,
    Judge,
    ModelBased,
    Proposer,
    Requires,
    SequenceOptions,
    Step,
)
from specplug.drafts.trees import likeliest
from specplug.planning.constants import JUDGED_TOP
from specplug.planning.fused_buckets import fused_buckets
from specplug.planning.judgement import DROPPED, Judgement

Drafts = list[tuple[int, Draft]]
"""Drafts for one sequence, with the indices of the proposers that made them; none is empty."""


class Fusion:
    """Every proposer drafts with the full budget; the merged tree is cut to its likeliest nodes.

    Buckets: those of `fused_buckets`. A node that several proposers agree on belongs to the one whose bucket is
    likelier. Where a model-based proposer has drafted, the other proposers' tokens beside its own have buckets by how
    likely it finds them. Proposers receive the Step of the merged draft, whose bucket ids are those of the fusion: they
    must not read them. Requires: everything that any of its proposers requires.
    State: one probability per bucket.
    Cost per step: that of the proposers; 20 us to merge two drafts of 16 nodes, 40 us where one judges the other, 1 us
    for a single proposer.
    """

    def __init__(
        self,
        sources: Sequence[Proposer],
        *,
        clock: Callable[[], int] = perf_counter_ns,
        names: Sequence[str] | None = None,
    ) -> None:
        """
        sources  the proposers, at least one
        clock    nanoseconds; it measures the time of each proposer
        names    of the proposers, for the names of buckets; None takes those of their classes
        """
        assert sources, "a fusion needs at least one proposer"
        self.sources = tuple(sources)
        self.prune_top_k: int | None = None
        """Where a model-based proposer has drafted, drop other drafts whose first token it can draft, but does not find
        among so many likeliest ones; None drops none."""
        models = frozenset(index for index, source in enumerate(sources) if isinstance(source, ModelBased))
        table = fused_buckets(
            [source.buckets for source in sources], names or [type(source).__name__ for source in sources], models
        )
        self.clock = clock
        self.requires = Requires()
        for source in self.sources:
            self.requires = self.requires.union(source.requires)
        self.buckets = table.buckets
        self.bucket_source = table.source
        self.own_buckets = table.own
        self._firsts = table.firsts
        self._agreed = table.agreed
        self._judged = table.judged
        self._models = models
        self._judges: dict[int, Judge] = {}
        for index in models if len(models) < len(sources) else ():
            source = sources[index]
            if isinstance(source, Judge):
                self._judges[index] = source
        self.probability = [bucket.prior for bucket in table.buckets]
        # Looked up once, as checking for a protocol takes a microsecond.
        self._in_batches = [source if isinstance(source, BatchProposer) else None for source in self.sources]
        self._configurable = [source for source in self.sources if isinstance(source, Configurable)]

    def first(self, index: int) -> int:
        """The index of a proposer's first bucket among those of the fusion."""
        return self._firsts[index]

    def begin(self, seq: int, prompt: IntArray, options: SequenceOptions = NO_OPTIONS) -> None:
        for configurable in self._configurable:
            configurable.configure(seq, options)
        for source in self.sources:
            source.begin(seq, prompt)

    def propose(self, seq: int, budget: int) -> Draft:
        found: list[Drafts] = [[]]
        for index in sorted(range(len(self.sources)), key=self._models.__contains__):  # models judge the others
            self.ask(index, [seq], [budget], (0,), found, [0] * len(self.sources))
        return self.merge([seq], found, [budget])[0]

    def ask(
        self,
        index: int,
        seqs: Sequence[int],
        budgets: Sequence[int],
        places: Sequence[int],
        found: Sequence[Drafts],
        spent_ns: list[int],
    ) -> None:
        """Ask one proposer, and add its drafts to those found.

        budgets   most nodes for each sequence
        places    the places in `seqs` for which it is asked
        found     per sequence the drafts so far, which are added to in the order of the proposers
        spent_ns  per proposer; the time that it takes is added
        """
        if not places:
            return
        source, in_batches = self.sources[index], self._in_batches[index]
        judge = self._judges.get(index)
        if judge is not None:
            judge.judged_top = JUDGED_TOP if any(found[place] for place in places) else 0
        began_ns = self.clock()
        if in_batches is not None:
            own = in_batches.propose_batch([seqs[place] for place in places], [budgets[place] for place in places])
        else:
            own = [source.propose(seqs[place], budgets[place]) for place in places]
        spent_ns[index] += self.clock() - began_ns
        for place, draft in zip(places, own, strict=True):
            if len(draft):
                insort(found[place], (index, draft), key=itemgetter(0))

    def merge(self, seqs: Sequence[int], found: Sequence[Drafts], budgets: Sequence[int]) -> list[Draft]:
        """One draft for each of `seqs` out of those that the proposers have made."""
        return [
            self._merge(drafts, budget, self._judgement(seq, drafts) if self._judges and len(drafts) > 1 else None)
            for seq, drafts, budget in zip(seqs, found, budgets, strict=True)
        ]

    def observe(self, seq: int, step: Step) -> None:
        for source in self.sources:
            source.observe(seq, step)

    def end(self, seq: int) -> None:
        for source in self.sources:
            source.end(seq)

    def _judgement(self, seq: int, drafts: Drafts) -> Judgement | None:
        """That of the first model-based proposer that has drafted; None where none has."""
        for index, draft in drafts:
            judge = self._judges.get(index)
            if judge is not None and (places := judge.likeliest(seq)):
                return Judgement(draft, places, judge.knows, self.prune_top_k)
        return None

    def _merge(self, drafts: Drafts, budget: int, judgement: Judgement | None) -> Draft:
        """One tree out of the proposers' drafts, none of which is empty."""
        if not drafts:
            return EMPTY
        if len(drafts) == 1:
            index, draft = drafts[0]
            first = self._firsts[index]
            return Draft(draft.tokens, draft.parents, draft.buckets + np.int32(first)) if first else draft
        probability, agreed_of = self.probability, self._agreed
        tokens: list[int] = []
        parents: list[int] = []
        buckets: list[int] = []
        node_at: dict[tuple[int, int], int] = {}
        for index, draft in drafts:
            first = self._firsts[index]
            judging = judgement if index not in self._models else None
            node_of: list[int] = []
            places: list[int | None] = []
            """Per node, the place of the judgement that its children are at."""
            for token, parent, bucket in zip(
                draft.tokens.tolist(), draft.parents.tolist(), draft.buckets.tolist(), strict=True
            ):
                bucket += first
                position = (ROOT if parent == ROOT else node_of[parent], token)
                if judging is not None:
                    at = 0 if parent == ROOT else places[parent]
                    band, following = judging.of(at, token)
                    places.append(following)
                    if position[0] == DROPPED or band == DROPPED:
                        node_of.append(DROPPED)
                        continue
                    if band is not None:
                        bucket = self._judged[band][bucket]
                node = node_at.get(position)
                if node is None:
                    node = node_at[position] = len(tokens)
                    tokens.append(token)
                    parents.append(position[0])
                    buckets.append(bucket)
                else:
                    known, bucket = agreed_of[buckets[node]], agreed_of[bucket]
                    buckets[node] = bucket if probability[bucket] > probability[known] else known
                node_of.append(node)
        draft = Draft.of(tokens, parents, buckets)
        if len(tokens) <= budget:
            return draft
        return draft.select(likeliest(parents, [probability[bucket] for bucket in buckets], budget))
