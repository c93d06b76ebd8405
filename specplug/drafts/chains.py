"""Chains for many sequences at once: what is asked of proposers where an engine verifies no trees.

Knows arrays of guesses and of what came, and how a proposer that knows single sequences answers for many. Knows no
engine. Drafting for 64 sequences one by one takes longer than a step of a GPU; over arrays it takes a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from specplug.core import EMPTY, Bucket, Draft, IntArray, Proposer, Requires, Step
from specplug.drafts.trees import likeliest_path, path_probabilities

NOTHING = -1
"""Fills a chain behind its end."""

SPREAD = 4
"""Nodes of a tree per token of the chain that is chosen from it."""


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """One chain per sequence.

    tokens  int32[n, k]  guessed ids, then NOTHING
    buckets int32[n, k]  why each was guessed: an index into the proposer's `buckets`; 0 behind the end
    """

    tokens: IntArray
    buckets: IntArray

    @classmethod
    def empty(cls, n: int, k: int) -> Chains:
        return cls(np.full((n, k), NOTHING, dtype=np.int32), np.zeros((n, k), dtype=np.int32))

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]], buckets: Sequence[Sequence[int]], k: int) -> Chains:
        """From ragged lists, none longer than k."""
        return cls(_padded(tokens, k, NOTHING), _padded(buckets, k, 0))

    def check(self, n: int, k: int, *, num_tokens: int, num_buckets: int) -> None:
        """Raise ValueError unless these are chains for n sequences of k tokens at most, ids below the two limits."""
        if not (self.tokens.shape == self.buckets.shape == (n, k)):
            raise ValueError(f"shapes {self.tokens.shape} and {self.buckets.shape} where {(n, k)} was asked")
        if not (self.tokens.dtype == self.buckets.dtype == np.int32):
            raise ValueError("chains must be int32")
        if self.tokens.size == 0:
            return
        if self.tokens.min() < NOTHING or self.tokens.max() >= num_tokens:
            raise ValueError("a token id is outside the vocabulary")
        if self.buckets.min() < 0 or self.buckets.max() >= num_buckets:
            raise ValueError("a bucket is outside the proposer's table")
        if ((self.tokens[:, :-1] == NOTHING) & (self.tokens[:, 1:] != NOTHING)).any():
            raise ValueError("a chain has a gap")


@dataclass(frozen=True, slots=True, eq=False)
class ChainSteps:
    """What came of several sequences since they were last told.

    seqs     the sequences
    emitted  per sequence the new tokens in order, one or more
    before   int32[m]  of every new token the one it follows, all sequences one after the other
    after    int32[m]  the new tokens
    read     int32[r]  tokens that the target read in its latest pass, on the way that came true
    topk     int32[r, k]  what it ranked highest after each, most likely first; None where nobody asked for it
    """

    seqs: Sequence[int]
    emitted: Sequence[Sequence[int]]
    before: IntArray
    after: IntArray
    read: IntArray
    topk: IntArray | None = None


@runtime_checkable
class ChainProposer(Protocol):
    """Guesses the next tokens of many sequences at once; otherwise as `core.Proposer`."""

    requires: Requires
    buckets: tuple[Bucket, ...]

    def begin(self, seq: int, prompt: IntArray) -> None: ...

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        """At most k tokens for each of `seqs`. Changes no visible state."""

    def observe_chains(self, steps: ChainSteps) -> None:
        """Append what was emitted, learn from the rest."""

    def end(self, seq: int) -> None: ...


class OneByOne:
    """A proposer that drafts trees for single sequences, asked for chains: of each tree the path that promises most.

    Its `observe` is told one token at a time, with the top ids after the token it follows, where there are any.
    """

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self.requires = proposer.requires
        self.buckets = proposer.buckets
        self.begin = proposer.begin
        self.end = proposer.end
        self._prior = [bucket.prior for bucket in proposer.buckets]

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        chains = [self._chain(seq, SPREAD * k) for seq in seqs]
        tokens = [chain.tokens[:k].tolist() for chain in chains]
        return Chains.of(tokens, [chain.buckets[:k].tolist() for chain in chains], k)

    def _chain(self, seq: int, budget: int) -> Draft:
        draft = self.proposer.propose(seq, budget)
        if len(draft) > budget:
            raise ValueError(f"{len(draft)} nodes where {budget} were asked")
        draft.check(num_buckets=len(self.buckets))
        return likeliest_chain(draft, self._prior)

    def observe_chains(self, steps: ChainSteps) -> None:
        topk = {} if steps.topk is None else dict(zip(steps.read.tolist(), steps.topk, strict=True))
        before = iter(steps.before.tolist())
        for seq, emitted in zip(steps.seqs, steps.emitted, strict=True):
            for token in emitted:
                row = topk.get(next(before))
                self.proposer.observe(seq, Step([token], EMPTY, [], None if row is None else row[None]))


def as_chains(proposer: Proposer) -> ChainProposer:
    """The proposer itself where it drafts chains for many, else through `OneByOne`."""
    return proposer if isinstance(proposer, ChainProposer) else OneByOne(proposer)


def likeliest_chain(draft: Draft, probability: Sequence[float]) -> Draft:
    """Of a tree the path with the largest sum of path probabilities: it brings the most tokens.

    probability  P(right) per bucket
    """
    parents = draft.parents.tolist()
    line = path_probabilities(parents, [probability[bucket] for bucket in draft.buckets.tolist()])
    return draft.select(likeliest_path(parents, line))


def _padded(lists: Sequence[Sequence[int]], k: int, fill: int) -> IntArray:
    return np.array([[*line, *[fill] * (k - len(line))] for line in lists], dtype=np.int32).reshape(len(lists), k)
