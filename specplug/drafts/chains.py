"""Chains for many sequences at once, as arrays: the form of drafts for an engine that verifies no trees.

Drafting for 64 sequences one by one takes longer than a step of a GPU; as arrays it takes a millisecond. An adapter
lets any proposer of trees draft chains. This module does not depend on an engine or the planner.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from specplug.core import EMPTY, Bucket, Configurable, Draft, IntArray, Proposer, Requires, SequenceOptions, Step
from specplug.drafts.trees import likeliest_path, path_probabilities

NOTHING = -1
"""Fills the rest of a row after the end of its chain."""

NODES_PER_TOKEN = 4
"""Budget of a tree, in nodes per token of the chain that is chosen from it."""


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """One chain per sequence.

    tokens  int32[n, k]  the draft tokens, then NOTHING
    buckets int32[n, k]  why each was drafted: an index into the proposer's `buckets`; 0 past the end of the chain
    """

    tokens: IntArray
    buckets: IntArray

    @classmethod
    def empty(cls, n: int, k: int) -> Chains:
        return cls(np.full((n, k), NOTHING, dtype=np.int32), np.zeros((n, k), dtype=np.int32))

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]], buckets: Sequence[Sequence[int]], k: int) -> Chains:
        """Chains from lists of different lengths, none longer than k."""
        return cls(_padded(tokens, k, NOTHING), _padded(buckets, k, 0))

    def check(self, n: int, k: int, *, num_tokens: int, num_buckets: int) -> None:
        """Raise ValueError unless these are n chains of at most k tokens, with ids below the two limits."""
        if not (self.tokens.shape == self.buckets.shape == (n, k)):
            raise ValueError(f"chains have shapes {self.tokens.shape} and {self.buckets.shape}; {(n, k)} was asked")
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
    """The tokens of several sequences emitted since each was last observed.

    seqs     the sequences
    emitted  per sequence the new tokens in order, at least one
    before   int32[m]     for every new token the token that it follows; sequences are concatenated
    after    int32[m]     the new tokens
    read     int32[r]     tokens on the accepted paths of the latest target pass
    topk     int32[r, k]  the target's most likely ids after each of `read`, most likely first; None if not asked for
    """

    seqs: Sequence[int]
    emitted: Sequence[Sequence[int]]
    before: IntArray
    after: IntArray
    read: IntArray
    topk: IntArray | None = None


@runtime_checkable
class ChainProposer(Protocol):
    """Drafts chains for many sequences at once; otherwise the contract is that of `core.Proposer`."""

    requires: Requires
    buckets: tuple[Bucket, ...]

    def begin(self, seq: int, prompt: IntArray) -> None: ...

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        """A chain of at most k tokens for each of `seqs`. Changes no visible state."""

    def observe_chains(self, steps: ChainSteps) -> None:
        """Append the emitted tokens to their sequences, and learn from the rest."""

    def end(self, seq: int) -> None: ...


class TreeAdapter:
    """Lets a proposer of trees draft chains: of each tree the path with the largest sum of path probabilities.

    The proposer observes one token at a time, with the top ids after the token before it, where they were read.
    """

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self.requires = proposer.requires
        self.buckets = proposer.buckets
        self.begin = proposer.begin
        self.end = proposer.end
        self._prior = [bucket.prior for bucket in proposer.buckets]

    def configure(self, seq: int, options: SequenceOptions) -> None:
        if isinstance(self.proposer, Configurable):
            self.proposer.configure(seq, options)

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        chains = [self._chain(seq, NODES_PER_TOKEN * k) for seq in seqs]
        tokens = [chain.tokens[:k].tolist() for chain in chains]
        return Chains.of(tokens, [chain.buckets[:k].tolist() for chain in chains], k)

    def _chain(self, seq: int, budget: int) -> Draft:
        draft = self.proposer.propose(seq, budget)
        if len(draft) > budget:
            raise ValueError(f"the draft has {len(draft)} nodes; at most {budget} were asked")
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
    """The proposer itself if it drafts chains, else an adapter around it."""
    return proposer if isinstance(proposer, ChainProposer) else TreeAdapter(proposer)


def likeliest_chain(draft: Draft, probability: Sequence[float]) -> Draft:
    """The path of a tree with the largest sum of path probabilities: it yields the most expected tokens.

    probability  P(accepted | parent accepted) per bucket
    """
    parents = draft.parents.tolist()
    paths = path_probabilities(parents, [probability[bucket] for bucket in draft.buckets.tolist()])
    return draft.select(likeliest_path(parents, paths))


def _padded(lists: Sequence[Sequence[int]], k: int, fill: int) -> IntArray:
    return np.array([[*values, *[fill] * (k - len(values))] for values in lists], dtype=np.int32).reshape(len(lists), k)


def num_agreeing(one: Iterable[int], other: Iterable[int]) -> int:
    """How many leading tokens both have in common."""
    same = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        same += 1
    return same
