"""Fusion: the drafts of several proposers merged into one tree.

It merges by buckets and the acceptance learned for them, and does not depend on how a proposer drafts.
Source: the tree fusion of RASD (arXiv 2503.03434), which inserts every path into the tree of the first proposer along
their longest common prefix. This one merges any number of trees of any shape, marks nodes that several proposers agree
on, and cuts by path probability. RASD drops retrieved paths by their first token; see `judgement.py`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence, Set
from operator import itemgetter
from time import perf_counter_ns

import numpy as np

from specplug.core import (
    EMPTY,
    NO_OPTIONS,
    ROOT,
    BatchProposer,
    Configurable,
    Constrained,
    Draft,
    IntArray,
    Judge,
    ModelBased,
    Proposer,
    Requires,
    SequenceOptions,
    Step,
    TokenConstraint,
)
from specplug.drafts.trees import likeliest
from specplug.errors import SpecplugError
from specplug.planning.constants import JUDGED_TOP
from specplug.planning.constraint_cut import allowed_part
from specplug.planning.fused_buckets import fused_buckets
from specplug.planning.judgement import DROPPED, Judgement

Drafts = list[tuple[int, Draft]]
"""Drafts for one sequence, with the indices of the proposers that made them; none is empty."""


class Fusion:
    """Every proposer drafts with the full budget; the merged tree is cut to its likeliest nodes.

    Buckets: those of `fused_buckets`. A node that several proposers agree on belongs to the one whose bucket is
    likelier. Where a model-based proposer has drafted, the other proposers' tokens beside its own have buckets by how
    likely it finds them. Of a sequence with a constraint, the merged tree has only nodes that the constraint allows.
    Proposers receive the Step of the merged draft, whose bucket ids are those of the fusion: they must not read them.
    Requires: everything that any of its proposers requires.
    State: one probability per bucket; the constraint of each running sequence that has one.
    Cost per step: that of the proposers; 20 us to merge two drafts of 16 nodes, 40 us where one judges the other, 1 us
    for a single proposer; one question to the constraint per branch of the merged tree.
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
        self.constrained = frozenset(index for index, source in enumerate(sources) if isinstance(source, Constrained))
        """The proposers, by index, that are asked for sequences with a constraint only."""
        self.constraints: dict[int, TokenConstraint] = {}
        """The constraint of each running sequence that has one, after the tokens that it has observed."""
        names = names or [type(source).__name__ for source in sources]
        table = fused_buckets([source.buckets for source in sources], names, models, self.constrained)
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
        self._single = frozenset(
            bucket for bucket, source in enumerate(table.source.tolist()) if source in self.constrained
        )
        """The buckets of which there is none for agreement."""
        self._models = models
        self._judges: dict[int, Judge] = {}
        for index in models if len(models | self.constrained) < len(sources) else ():
            source = sources[index]
            if isinstance(source, Judge):
                self._judges[index] = source
        self.probability = [bucket.prior for bucket in table.buckets]
        # Looked up once, as checking for a protocol takes a microsecond.
        self._in_batches = [source if isinstance(source, BatchProposer) else None for source in self.sources]
        self._configurable = [source for source in self.sources if isinstance(source, Configurable)]
        self._constrained = [source for source in self.sources if isinstance(source, Constrained)]

    def first(self, index: int) -> int:
        """The index of a proposer's first bucket among those of the fusion."""
        return self._firsts[index]

    def begin(
        self,
        seq: int,
        prompt: IntArray,
        options: SequenceOptions = NO_OPTIONS,
        constraint: TokenConstraint | None = None,
    ) -> None:
        """`constraint` is that of the sequence's request, after the last token of the prompt; the fusion owns it."""
        for configurable in self._configurable:
            configurable.configure(seq, options)
        if constraint is not None:
            self.constraints[seq] = constraint
            for constrained in self._constrained:
                constrained.use_constraint(seq, constraint)
        for source in self.sources:
            source.begin(seq, prompt)

    def idle(self, seqs: Sequence[int]) -> Set[int]:
        """The proposers, by index, that draft for none of `seqs`."""
        if self.constrained and not any(seq in self.constraints for seq in seqs):
            return self.constrained
        return frozenset()

    def places(self, index: int, seqs: Sequence[int]) -> Sequence[int]:
        """The places in `seqs` of the sequences that a proposer drafts for."""
        if index in self.constrained:
            return [place for place, seq in enumerate(seqs) if seq in self.constraints]
        return range(len(seqs))

    def propose(self, seq: int, budget: int) -> Draft:
        found: list[Drafts] = [[]]
        for index in sorted(range(len(self.sources)), key=self._models.__contains__):  # models judge the others
            self.ask(index, [seq], [budget], self.places(index, [seq]), found, [0] * len(self.sources))
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
        merged = []
        for seq, drafts, budget in zip(seqs, found, budgets, strict=True):
            judgement = self._judgement(seq, drafts) if self._judges and len(drafts) > 1 else None
            draft = self._merge(drafts, judgement)
            constraint = self.constraints.get(seq) if self.constraints else None
            if constraint is not None and any(index not in self.constrained for index, _ in drafts):
                draft = allowed_part(draft, constraint)
            merged.append(self._within(draft, budget))
        return merged

    def observe(self, seq: int, step: Step) -> None:
        constraint = self.constraints.get(seq) if self.constraints else None
        if constraint is not None:
            try:
                constraint.advance(step.emitted)
            except (ValueError, SpecplugError):  # such as where the sequence has failed: nothing is drafted by it
                del self.constraints[seq]
        for source in self.sources:
            source.observe(seq, step)

    def end(self, seq: int) -> None:
        self.constraints.pop(seq, None)
        for source in self.sources:
            source.end(seq)

    def _judgement(self, seq: int, drafts: Drafts) -> Judgement | None:
        """That of the first model-based proposer that has drafted; None where none has."""
        for index, draft in drafts:
            judge = self._judges.get(index)
            if judge is not None and (places := judge.likeliest(seq)):
                return Judgement(draft, places, judge.knows, self.prune_top_k)
        return None

    def _merge(self, drafts: Drafts, judgement: Judgement | None) -> Draft:
        """One tree out of the proposers' drafts, none of which is empty."""
        if not drafts:
            return EMPTY
        if len(drafts) == 1:
            index, draft = drafts[0]
            first = self._firsts[index]
            return Draft(draft.tokens, draft.parents, draft.buckets + np.int32(first)) if first else draft
        probability, agreed_of, single = self.probability, self._agreed, self._single
        tokens: list[int] = []
        parents: list[int] = []
        buckets: list[int] = []
        node_at: dict[tuple[int, int], int] = {}
        for index, draft in drafts:
            first = self._firsts[index]
            judging = judgement if index not in self._models and index not in self.constrained else None
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
                    known = buckets[node]
                    if known not in single and bucket not in single:
                        known, bucket = agreed_of[known], agreed_of[bucket]
                    buckets[node] = bucket if probability[bucket] > probability[known] else known
                node_of.append(node)
        return Draft.of(tokens, parents, buckets)

    def _within(self, draft: Draft, budget: int) -> Draft:
        """The likeliest nodes of a draft, as many as the budget."""
        if len(draft) <= budget:
            return draft
        paths = [self.probability[bucket] for bucket in draft.buckets.tolist()]
        return draft.select(likeliest(draft.parents.tolist(), paths, budget))
