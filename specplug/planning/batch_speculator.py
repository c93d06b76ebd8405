"""One step's speculation for a batch of sequences as chains: ask the sources that pay, plan the batch, learn.

Knows chain proposers, the planner's rule and the cost of a pass by batch size. Knows no engine. `speculator.py` does
the same for trees of few sequences, node by node; here every calculation is one over the whole batch.
Source: expected goodput of a batch as in SmartSpec (arXiv 2406.14066), measured costs in place of its fitted line.
Keeps: per running sequence the chain it was last offered.
Cost per step: 1.7 ms for 64 sequences and four tokens with suffix and token recycling (benchmarks/vllm_overhead.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from specplug.core import FloatArray, IntArray
from specplug.drafts.chains import NOTHING, ChainProposer, Chains, ChainSteps
from specplug.planning.acceptance import AcceptanceTable
from specplug.planning.back_off import BackOff
from specplug.planning.constants import MIN_SPEEDUP, TOPK_COST_WEIGHT
from specplug.planning.cost import BatchCost, CostCurve
from specplug.planning.fusion import Fusion
from specplug.profile import CostPoints


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlan:
    """What to verify.

    lengths  int32[n]  tokens of each chain
    chains   what they were chosen from
    owners   int32[n, k]  the source of each guess; -1 where several guess alike, or behind the end
    path     float64[n, k]  P(accepted) of each guess; 0 behind the end
    expected_tokens  accepted guesses and the target's own, over the batch
    """

    lengths: IntArray
    chains: Chains
    owners: IntArray
    path: FloatArray
    expected_tokens: float


class BatchSpeculator:
    """Drafts for one engine whose batch changes at every step.

    Call `due` once per step. Where it says yes: `begin` new sequences, `observe` what came of the others, `plan`.
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
        """k  longest chain; static  verify it all, whatever it costs; uniform  k tokens for every sequence or none"""
        self.sources = tuple(sources)
        self.names = tuple(names)
        self.cost = cost
        self.k = k
        self.static = static
        self.uniform = uniform
        self.clock = clock
        self._buckets = Fusion(sources, names=names)  # type: ignore[arg-type]  # for its table of buckets alone
        self.table = AcceptanceTable(self._buckets.buckets, learned)
        # One more for sources without buckets, which never guess.
        self._probability: FloatArray = np.array([*self.table.probability, 0.0])
        self._back_offs = [BackOff() for _ in sources]
        self.asked: list[int] = []
        """The sources, by index, that were asked in the step under way."""
        self.wants_topk = 0
        """How many top ids per row the next pass should bring; 0 for none."""
        self._offered: dict[int, tuple[list[int], list[int]]] = {}
        self._topk_ns = 0.0
        self._began = 0
        self._room: IntArray = np.zeros(0, dtype=np.int32)

    def due(self, sequences: int = 0) -> bool:
        """Count one step; whether any source should be asked in it. What follows, until `plan` ends, is its cost.

        sequences  of the pass before, where it was timed, as the next one probably will be; else 0
        """
        plain_due = sequences > 0 and self.cost.plain_due(sequences)
        self.asked = [i for i, rest in enumerate(self._back_offs) if self.static or (rest.tick() and not plain_due)]
        if not self.asked:
            self.wants_topk = 0
            return False
        self._began = self.clock()
        return True

    def begin(self, seq: int, prompt: IntArray) -> None:
        for source in self.sources:
            source.begin(seq, prompt)

    def end(self, seq: int) -> None:
        self._offered.pop(seq, None)
        for source in self.sources:
            source.end(seq)

    def observe(self, steps: ChainSteps, topk_ns: int = 0) -> None:
        """Learn from what came since a sequence was last told; `topk_ns` is what reading the top ids took."""
        for source in self.sources:
            source.observe_chains(steps)
        self._topk_ns += (topk_ns - self._topk_ns) * TOPK_COST_WEIGHT
        self._learn(steps)

    def plan(self, seqs: Sequence[int], sequences: int, context: int, budgets: IntArray) -> BatchPlan:
        """What to verify for each of `seqs`.

        sequences  running in all, of which `seqs` may be a part
        context    mean KV fill, tokens
        budgets    int32[n]  most tokens for each sequence, >= 0
        """
        spent = [0] * len(self.sources)
        offers: list[tuple[int, Chains]] = []
        for index in self.asked:
            asked = self.clock()
            offers.append((index, self.sources[index].propose_chains(seqs, self.k)))
            spent[index] = self.clock() - asked
        self.wants_topk = max((self.sources[i].requires.topk for i in self.asked), default=0)
        chains, owners, path = self._fuse(offers, len(seqs))
        path[np.arange(self.k) >= budgets[:, None]] = 0.0
        if self.uniform:  # who has no room for k is left out
            path[budgets < self.k] = 0.0
            self._room = (budgets >= self.k).astype(np.int32)
        self._offered.update(zip(seqs, zip(chains.tokens.tolist(), chains.buckets.tolist(), strict=True), strict=True))
        ms = self.cost.at(sequences, context)
        lengths, expected = self._choose(path, sequences, ms)
        plan = BatchPlan(lengths, chains, owners, path, expected)
        if not self.static:
            self._tally(plan, sequences, ms, spent, self.clock() - self._began)
        return plan

    # -- one chain out of several --------------------------------------------------------------------------------

    def _fuse(self, offers: Sequence[tuple[int, Chains]], n: int) -> tuple[Chains, IntArray, FloatArray]:
        """Per sequence the chain that promises most, with the buckets of agreement where others say the same."""
        if not offers:
            return Chains.empty(n, self.k), np.full((n, self.k), -1, dtype=np.int32), np.zeros((n, self.k))
        found: list[tuple[IntArray, IntArray, FloatArray]] = []
        for index, offer in offers:
            buckets = offer.buckets + np.int32(self._buckets.first(index))
            agreed = np.zeros(offer.tokens.shape, dtype=bool)
            for other, theirs in offers:
                if other != index:
                    agreed |= np.logical_and.accumulate(offer.tokens == theirs.tokens, axis=1)
            agreed &= offer.tokens != NOTHING
            buckets[agreed] += np.int32(len(self.sources[index].buckets))
            path = np.where(offer.tokens == NOTHING, 0.0, self._probability[buckets]).cumprod(axis=1)
            found.append((buckets, np.where(agreed, -1, np.int32(index)), path))
        tokens, (buckets, owners, path) = offers[0][1].tokens, found[0]
        for (_, offer), (other_buckets, other_owners, other_path) in zip(offers[1:], found[1:], strict=True):
            better = (other_path.sum(axis=1) > path.sum(axis=1))[:, None]
            tokens = np.where(better, offer.tokens, tokens)
            buckets = np.where(better, other_buckets, buckets)
            owners = np.where(better, other_owners, owners)
            path = np.where(better, other_path, path)
        owners = np.where(tokens == NOTHING, -1, owners).astype(np.int32)
        return Chains(tokens, buckets), owners, path

    # -- how many ------------------------------------------------------------------------------------------------

    def _choose(self, path: FloatArray, sequences: int, ms: FloatArray) -> tuple[IntArray, float]:
        """Tokens per chain, and how many are expected to come of the batch."""
        n = len(path)
        nothing = np.zeros(n, dtype=np.int32), float(sequences)
        if self.static:
            lengths = np.count_nonzero(path, axis=1).astype(np.int32)
            if self.uniform:
                lengths = self._room * np.int32(self.k if path.any() else 0)
            return lengths, sequences + float(path.sum())
        if sequences > len(ms) or not n:
            return nothing
        if self.uniform:
            rows = sequences + int(self._room.sum()) * self.k
            if rows > len(ms) or not path.any():
                return nothing
            tokens = sequences + float(path.sum())
            if tokens / ms[rows - 1] <= MIN_SPEEDUP * sequences / ms[sequences - 1]:
                return nothing
            return self._room * np.int32(self.k), tokens
        order, likely = _ranked(path, len(ms) - sequences)
        count = _best_count(likely, sequences, ms)
        if not count:
            return nothing
        lengths = np.bincount(order[:count] // self.k, minlength=n).astype(np.int32)
        return lengths, sequences + float(likely[:count].sum())

    # -- learning ------------------------------------------------------------------------------------------------

    def _learn(self, steps: ChainSteps) -> None:
        """Shadow-score what was last offered, verified or not, against what came."""
        hits: dict[int, int] = {}
        misses: dict[int, int] = {}
        for seq, emitted in zip(steps.seqs, steps.emitted, strict=True):
            offered = self._offered.pop(seq, None)
            if offered is None:
                continue
            for token, bucket, came in zip(*offered, emitted, strict=False):
                if token == NOTHING:
                    break
                if token != came:
                    misses[bucket] = misses.get(bucket, 0) + 1
                    break
                hits[bucket] = hits.get(bucket, 0) + 1
        for bucket in sorted(hits.keys() | misses.keys()):
            self.table.count(bucket, hits.get(bucket, 0), misses.get(bucket, 0))
            self._probability[bucket] = self.table.probability[bucket]

    def _tally(self, plan: BatchPlan, sequences: int, ms: FloatArray, spent: Sequence[int], total_ns: int) -> None:
        """Tell every source that was asked whether it gained more time than asking it took."""
        plain_ms = float(ms[min(sequences, len(ms)) - 1])
        common_ns = (total_ns - sum(spent) - self._topk_ns) / len(self.asked)
        readers = sum(self.sources[i].requires.topk > 0 for i in self.asked)
        order = sorted(self.asked, key=lambda i: self._back_offs[i].cost_ms)
        credited = 0.0
        for place, index in enumerate(order, start=1):
            later = order[place:]
            path = np.where(np.isin(plan.owners, later), 0.0, plan.path) if later else plan.path
            saved_ms = self._saved_ms(path, sequences, ms)
            ns = spent[index] + common_ns
            if self.sources[index].requires.topk:
                ns += self._topk_ns / readers
            rest = self._back_offs[index]
            rest.record(ns / 1e6, saved_ms - credited, plain_ms)
            credited = saved_ms

    def _saved_ms(self, path: FloatArray, sequences: int, ms: FloatArray) -> float:
        """What verifying the best of these chains is expected to save over plain decoding."""
        lengths, expected = self._choose(path, sequences, ms)
        rows = sequences + int(lengths.sum())
        if rows == sequences:
            return 0.0
        return float(ms[sequences - 1] * expected / sequences - ms[rows - 1])


def batch_cost(curves: Iterable[CostPoints]) -> BatchCost:
    """Of a profile's curves."""
    return BatchCost(
        {
            curve.sequences: CostCurve(curve.contexts, curve.rows, [list(line) for line in curve.ms], curve.change_ms)
            for curve in curves
        }
    )


def _ranked(path: FloatArray, limit: int) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """The likeliest guesses, as flat indices, and P(accepted) of each. A guess never stands before its parent."""
    flat = path.ravel()
    order: npt.NDArray[np.intp] = np.argsort(-flat, kind="stable")[: min(limit, np.count_nonzero(flat))]
    return order, flat[order]


def _best_count(likely: FloatArray, sequences: int, ms: FloatArray) -> int:
    """How many of the likeliest guesses to verify: every number is tried."""
    tokens = np.cumsum(np.concatenate(([float(sequences)], likely)))
    rate = tokens / ms[sequences - 1 : sequences + len(likely)]
    rate[0] *= MIN_SPEEDUP
    return int(rate.argmax())
