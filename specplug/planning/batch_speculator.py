"""One step of speculation for a batch of sequences, as chains: ask the proposers, plan the target pass, learn.

It plans as `speculator.py` does for trees of a few sequences, but calculates with arrays over the complete batch. It
depends on chain proposers and the cost of a pass by batch size, not on an engine.
Source: expected goodput of a batch as in SmartSpec (arXiv 2406.14066), with measured costs instead of a fitted line.
State: per running sequence the latest complete chain.
Cost per step: 1.7 ms for 64 sequences and four tokens with suffix and token recycling (benchmarks/vllm_overhead.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from specplug.core import NO_OPTIONS, Configurable, FloatArray, IntArray, SequenceOptions
from specplug.drafts.chains import NOTHING, ChainProposer, Chains, ChainSteps
from specplug.planning.acceptance import AcceptanceTable
from specplug.planning.constants import MIN_SPEEDUP, TOPK_COST_WEIGHT
from specplug.planning.cost import BatchCost, CostCurve
from specplug.planning.fused_buckets import fused_buckets
from specplug.planning.proposer_selection import ProposerSelection
from specplug.profile import CostPoints


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlan:
    """The draft tokens to verify in one pass.

    lengths          int32[n]       tokens of each chain to verify
    chains           the complete chains
    owners           int32[n, k]    index of the proposer of each draft token; -1 where several agree, or past the end
    path             float64[n, k]  path probability of each draft token; 0 past the end
    expected_tokens  accepted draft tokens plus one token of the target's own per sequence, over the batch
    """

    lengths: IntArray
    chains: Chains
    owners: IntArray
    path: FloatArray
    expected_tokens: float


class BatchSpeculator:
    """Drafts for one engine whose batch may change at every step.

    Call `should_draft` once per step. Where it returns True, call `begin` for new sequences, `observe` for the others,
    and `plan`.
    """

    def __init__(
        self,
        sources: Sequence[ChainProposer],
        names: Sequence[str],
        cost: BatchCost,
        *,
        k: int,
        static: bool = False,
        uniform: bool = False,
        learned: Mapping[str, Sequence[float]] | None = None,
        clock: Callable[[], int] = perf_counter_ns,
    ) -> None:
        """
        k        longest chain
        static   True verifies all draft tokens, whatever they cost; for comparisons
        uniform  True verifies k tokens for every sequence that has room for them, or none at all
        learned  maps bucket names to the (hits, misses) to start from
        clock    nanoseconds
        """
        self.sources = tuple(sources)
        self.names = tuple(names)
        self.cost = cost
        self.k = k
        self.static = static
        self.uniform = uniform
        self.clock = clock
        self._buckets = fused_buckets([source.buckets for source in sources], names)
        self.table = AcceptanceTable(self._buckets.buckets, learned)
        # One more for proposers without buckets, which never draft.
        self._probability: FloatArray = np.array([*self.table.probability, 0.0])
        self.selection = ProposerSelection(sources, clock, static=static)
        self.wants_topk = 0
        """How many top ids per row the next pass should provide; 0 for none."""
        self._configurable = [source for source in self.sources if isinstance(source, Configurable)]
        self._last_chains: dict[int, tuple[list[int], list[int]]] = {}
        self._topk_ns = 0.0
        self._has_room: IntArray = np.zeros(0, dtype=np.int32)

    def should_draft(self, sequences: int = 0) -> bool:
        """Count one step; True if any proposer should be asked in it. Time from here to the end of `plan` is charged.

        sequences  in the previous pass, if it was timed (then the next one probably will be, too); else 0
        """
        plain_due = sequences > 0 and self.cost.plain_due(sequences)
        if self.selection.select(plain_due=plain_due):
            return True
        self.wants_topk = 0
        return False

    def begin(self, seq: int, prompt: IntArray, options: SequenceOptions = NO_OPTIONS) -> None:
        for configurable in self._configurable:
            configurable.configure(seq, options)
        for source in self.sources:
            source.begin(seq, prompt)

    def end(self, seq: int) -> None:
        self._last_chains.pop(seq, None)
        for source in self.sources:
            source.end(seq)

    def observe(self, steps: ChainSteps, topk_ns: int = 0) -> None:
        """Learn from the tokens emitted since the sequences were last observed.

        topk_ns  time that reading the top ids took
        """
        for source in self.sources:
            source.observe_chains(steps)
        self._topk_ns += (topk_ns - self._topk_ns) * TOPK_COST_WEIGHT
        self._learn(steps)

    def plan(self, seqs: Sequence[int], sequences: int, context: int, budgets: IntArray) -> BatchPlan:
        """The draft tokens to verify for each of `seqs`.

        sequences  number of running sequences, of which `seqs` may be a part
        context    mean KV cache fill, tokens
        budgets    int32[n]  most tokens for each of `seqs`, >= 0
        """
        chains, owners, path = self._fuse(self._propose(seqs), len(seqs))
        self.wants_topk = self.selection.topk()
        path[np.arange(self.k) >= budgets[:, None]] = 0.0
        if self.uniform:
            path[budgets < self.k] = 0.0
            self._has_room = (budgets >= self.k).astype(np.int32)
        lines = zip(chains.tokens.tolist(), chains.buckets.tolist(), strict=True)
        self._last_chains.update(zip(seqs, lines, strict=True))
        ms = self.cost.at(sequences, context)
        lengths, expected_tokens = self._choose(path, sequences, ms)
        plan = BatchPlan(lengths, chains, owners, path, expected_tokens)
        if not self.static:
            self.selection.credit(
                common_ns=self.selection.common_ns() - self._topk_ns,
                topk_ns=self._topk_ns,
                plain_ms=float(ms[min(sequences, len(ms)) - 1]),
                expected_ms=lambda without: self._expected_ms(plan, without, sequences, ms),
            )
        return plan

    # -- choosing one chain per sequence -------------------------------------------------------------------------

    def _propose(self, seqs: Sequence[int]) -> list[tuple[int, Chains]]:
        """The chains of every proposer that is asked, with its index."""
        proposed: list[tuple[int, Chains]] = []
        for index in self.selection.asked:
            began_ns = self.clock()
            proposed.append((index, self.sources[index].propose_chains(seqs, self.k)))
            self.selection.spent_ns[index] = self.clock() - began_ns
        return proposed

    def _fuse(self, proposed: Sequence[tuple[int, Chains]], n: int) -> tuple[Chains, IntArray, FloatArray]:
        """Per sequence the chain with the largest sum of path probabilities, its owners and these probabilities.

        Draft tokens that other proposers agree on up to there have the buckets of agreement.
        """
        if not proposed:
            return Chains.empty(n, self.k), np.full((n, self.k), -1, dtype=np.int32), np.zeros((n, self.k))
        fused: list[tuple[IntArray, IntArray, FloatArray]] = []
        for index, own in proposed:
            buckets = own.buckets + np.int32(self._buckets.firsts[index])
            agreed = np.zeros(own.tokens.shape, dtype=bool)
            for other_index, other in proposed:
                if other_index != index:
                    agreed |= np.logical_and.accumulate(own.tokens == other.tokens, axis=1)
            agreed &= own.tokens != NOTHING
            buckets[agreed] += np.int32(len(self.sources[index].buckets))
            path = np.where(own.tokens == NOTHING, 0.0, self._probability[buckets]).cumprod(axis=1)
            fused.append((buckets, np.where(agreed, -1, np.int32(index)), path))
        tokens, (buckets, owners, path) = proposed[0][1].tokens, fused[0]
        for (_, other), (other_buckets, other_owners, other_path) in zip(proposed[1:], fused[1:], strict=True):
            better = (other_path.sum(axis=1) > path.sum(axis=1))[:, None]
            tokens = np.where(better, other.tokens, tokens)
            buckets = np.where(better, other_buckets, buckets)
            owners = np.where(better, other_owners, owners)
            path = np.where(better, other_path, path)
        owners = np.where(tokens == NOTHING, -1, owners).astype(np.int32)
        return Chains(tokens, buckets), owners, path

    # -- choosing the number of tokens of each chain -------------------------------------------------------------

    def _choose(self, path: FloatArray, sequences: int, ms: FloatArray) -> tuple[IntArray, float]:
        """int32[n]: how many tokens of each chain to verify; and the expected tokens of the batch."""
        n = len(path)
        nothing = np.zeros(n, dtype=np.int32), float(sequences)
        if self.static:
            lengths = np.count_nonzero(path, axis=1).astype(np.int32)
            if self.uniform:
                lengths = self._has_room * np.int32(self.k if path.any() else 0)
            return lengths, sequences + float(path.sum())
        if sequences > len(ms) or not n:
            return nothing
        if self.uniform:
            rows = sequences + int(self._has_room.sum()) * self.k
            if rows > len(ms) or not path.any():
                return nothing
            tokens = sequences + float(path.sum())
            if tokens / ms[rows - 1] <= MIN_SPEEDUP * sequences / ms[sequences - 1]:
                return nothing
            return self._has_room * np.int32(self.k), tokens
        order, probability = ranked(path, len(ms) - sequences)
        count = best_count(probability, sequences, ms)
        if not count:
            return nothing
        lengths = np.bincount(order[:count] // self.k, minlength=n).astype(np.int32)
        return lengths, sequences + float(probability[:count].sum())

    def _expected_ms(self, plan: BatchPlan, without: Sequence[int], sequences: int, ms: FloatArray) -> float:
        """Time that verifying the best part of the chains is expected to save, without the tokens of some proposers."""
        path = np.where(np.isin(plan.owners, without), 0.0, plan.path) if without else plan.path
        lengths, expected_tokens = self._choose(path, sequences, ms)
        rows = sequences + int(lengths.sum())
        if rows == sequences:
            return 0.0
        return float(ms[sequences - 1] * expected_tokens / sequences - ms[rows - 1])

    # -- learning ------------------------------------------------------------------------------------------------

    def _learn(self, steps: ChainSteps) -> None:
        """Compare the chains of the latest plan, verified or not, with the emitted tokens."""
        hits: dict[int, int] = {}
        misses: dict[int, int] = {}
        for seq, emitted in zip(steps.seqs, steps.emitted, strict=True):
            chain = self._last_chains.pop(seq, None)
            if chain is None:
                continue
            for token, bucket, emitted_token in zip(*chain, emitted, strict=False):
                if token == NOTHING:
                    break
                if token != emitted_token:
                    misses[bucket] = misses.get(bucket, 0) + 1
                    break
                hits[bucket] = hits.get(bucket, 0) + 1
        for bucket in sorted(hits.keys() | misses.keys()):
            self.table.count(bucket, hits.get(bucket, 0), misses.get(bucket, 0))
            self._probability[bucket] = self.table.probability[bucket]


def batch_cost(curves: Iterable[CostPoints]) -> BatchCost:
    """The costs that a profile stores, by batch size."""
    return BatchCost(
        {
            curve.sequences: CostCurve(curve.contexts, curve.rows, [list(line) for line in curve.ms], curve.change_ms)
            for curve in curves
        }
    )


def ranked(path: FloatArray, limit: int) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Flat indices of the `limit` likeliest draft tokens, and their path probabilities; parents before children."""
    flat = path.ravel()
    order: npt.NDArray[np.intp] = np.argsort(-flat, kind="stable")[: min(limit, np.count_nonzero(flat))]
    return order, flat[order]


def best_count(probability: FloatArray, sequences: int, ms: FloatArray, least_speedup: float = MIN_SPEEDUP) -> int:
    """How many of the likeliest draft tokens to verify: every number is tried.

    probability    of the draft tokens, the likeliest first
    ms             by rows, from 1 on
    least_speedup  drafts are expected to be this many times as fast as none
    """
    tokens = np.cumsum(np.concatenate(([float(sequences)], probability)))
    rate = tokens / ms[sequences - 1 : sequences + len(probability)]
    rate[0] *= least_speedup
    return int(rate.argmax())
