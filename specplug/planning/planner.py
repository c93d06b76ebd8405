"""The planner: it chooses the draft tokens to verify in the next target pass.

For every running sequence it chooses a subtree of its draft, possibly empty, so that the expected number of tokens per
millisecond is largest. It works on drafts, learned acceptance and the measured cost curve; it does not depend on
proposers, engines or what a token means.
Source: expected goodput as in SmartSpec (arXiv 2406.14066), here for trees, with measured costs for every number of
rows instead of a fitted line; decayed counts and scoring of unverified drafts as in DEL (arXiv 2504.05598).
State: none of its own; the acceptance table and the cost curve are shared with the speculator.
Cost per step: about 1.5 us per candidate node.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from specplug.core import EMPTY, NO_LIMITS, Draft, DraftLimits
from specplug.drafts.trees import likeliest_path, path_probabilities
from specplug.planning.acceptance import AcceptanceTable
from specplug.planning.constants import MIN_SPEEDUP
from specplug.planning.even_chains import best_length, reread_costs


class Cost(Protocol):
    """The interface of a cost curve; `specplug.planning.cost.CostCurve` implements it."""

    limit: int
    change_ms: float

    def at(self, context: int) -> list[float]: ...

    def optimistic(self, context: int) -> list[float] | None: ...


RankedNode = tuple[float, int, int]
"""(-path probability, place of the sequence, node): sorted, the likeliest node is first."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The subtrees to verify, one per sequence (often EMPTY), and the candidates that they were chosen from.

    rows             rows of the target pass: one per sequence and one per chosen node, and those that fill chains up
    expected_tokens  accepted draft tokens plus one token of the target's own per sequence
    expected_ms      time of the pass, without drafting, and of `reread_ms`
    reread_ms        expected time in which rows are evaluated once more after rejections (`DraftLimits.rereads`)
    candidates       the drafts that the subtrees were chosen from
    ranked           the nodes of all candidates, likeliest first
    ms               the costs by which they were chosen; `ms[r - 1]` is that of r rows
    change_ms        the part of `ms` that is due to changing the row count; not in that of `last_rows`
    last_rows        rows of the pass before; 0 if unknown
    """

    drafts: list[Draft]
    rows: int
    expected_tokens: float
    expected_ms: float
    candidates: Sequence[Draft] = ()
    ranked: Sequence[RankedNode] = ()
    ms: Sequence[float] = ()
    change_ms: float = 0.0
    last_rows: int = 0
    reread_ms: float = 0.0


class Planner:
    """Plans the target passes of one engine."""

    def __init__(
        self,
        table: AcceptanceTable,
        cost: Cost,
        *,
        max_nodes: int,
        trees: bool = True,
        static: bool = False,
        limits: DraftLimits = NO_LIMITS,
    ) -> None:
        """
        max_nodes  most nodes verified in one pass, over all sequences
        trees      False verifies chains only: of each tree its likeliest path
        static     True verifies the `max_nodes` likeliest nodes whatever they cost; for comparisons
        limits     limits of the target's memory; `limits.trees` False has the effect of `trees` False
        """
        self.table = table
        self.cost = cost
        self.max_nodes = min(max_nodes, cost.limit - 1)
        self.trees = trees and limits.trees
        self.static = static
        self.limits = limits
        self._even = limits.even or limits.rereads

    def plan(
        self,
        drafts: Sequence[Draft],
        context: int,
        row_ms: float = 0.0,
        last_rows: int = 0,
        ms: list[float] | None = None,
    ) -> Plan:
        """Choose a subtree of each of `drafts`, of which every running sequence has one.

        context    mean KV cache fill of the sequences, tokens
        row_ms     cost of each row besides the target pass (reading its top ids), milliseconds
        last_rows  rows of the pass before, 0 if unknown. Another row count costs `change_ms`; leaving plain decoding
                   costs it twice, since returning to it changes the row count again
        ms         costs of 1, 2, ... rows to plan with; those of the cost curve where None
        """
        sequences = len(drafts)
        ms = self.cost.at(context) if ms is None else ms
        change_ms = self.cost.change_ms * (2 if last_rows <= sequences else 1)
        if row_ms or change_ms:
            ms = [cost + row_ms * rows + change_ms for rows, cost in enumerate(ms, 1)]
            for rows in {sequences, last_rows} - {0}:
                if rows <= len(ms):
                    ms[rows - 1] -= change_ms
        if not any(map(len, drafts)) or sequences >= len(ms):
            return Plan([EMPTY] * sequences, sequences, float(sequences), ms[min(sequences, len(ms)) - 1])
        if self.limits.depth is not None:
            drafts = [_cut(draft, self.limits.depth) for draft in drafts]
        probability = self.table.probability
        paths = [
            path_probabilities(draft.parents.tolist(), [probability[bucket] for bucket in draft.buckets.tolist()])
            for draft in drafts
        ]
        if not self.trees:
            drafts, paths = _likeliest_chains(drafts, paths)
        if self._even:
            return self._even_plan(drafts, paths, ms, change_ms, last_rows)
        ranked, count = best_nodes(drafts, paths, ms, self.max_nodes)
        if self.static:
            count = min(len(ranked), self.max_nodes)
        chosen: list[list[int]] = [[] for _ in drafts]
        expected_tokens = float(sequences)
        for negative, place, node in ranked[:count]:
            expected_tokens -= negative
            chosen[place].append(node)
        return Plan(
            [_subtree(draft, nodes) for draft, nodes in zip(drafts, chosen, strict=True)],
            sequences + count,
            expected_tokens,
            ms[min(sequences + count, len(ms)) - 1],
            drafts,
            ranked,
            ms,
            change_ms,
            last_rows,
        )

    def _even_plan(
        self,
        chains: Sequence[Draft],
        paths: Sequence[Sequence[float]],
        ms: Sequence[float],
        change_ms: float,
        last_rows: int,
    ) -> Plan:
        """As `plan`, with chains of one length."""
        choice = best_length(paths, ms, self.max_nodes, rereads=self.limits.rereads, static=self.static)
        return Plan(
            [_subtree(chain, list(range(min(choice.length, len(chain))))) for chain in chains],
            choice.rows,
            choice.tokens,
            choice.pass_ms + choice.reread_ms,
            chains,
            _ranked(paths),
            ms,
            change_ms,
            last_rows,
            choice.reread_ms,
        )

    def best_rows(self, plan: Plan, ms: Sequence[float]) -> int:
        """Rows of the best pass from a plan's candidates, with other costs: `ms[r - 1]` is that of r rows."""
        sequences = len(plan.drafts)
        if self._even:
            return best_length(_paths(plan.ranked, sequences), ms, self.max_nodes, rereads=self.limits.rereads).rows
        return sequences + _best_count(plan.ranked, sequences, ms, self.max_nodes)

    def another_pays(
        self,
        path: Sequence[float],
        acceptance_rate: float,
        draft_token_ms: float,
        context: int,
        sequences: int,
        least_rate: float = 0.0,
    ) -> bool:
        """Whether a model-based proposer should draft one more token of a chain.

        It should if some number of further draft tokens gives more expected tokens per millisecond than stopping here
        and verifying any part of the chain. The time for the draft so far is spent in either case.

        path             path probability of each draft token of the chain so far
        acceptance_rate  share of further draft tokens that are expected to be accepted
        draft_token_ms   time to draft each of them, milliseconds
        least_rate       expected tokens per millisecond without this proposer, where others have drafted
        """
        longest = self._longest(self.max_nodes)
        if self.static:
            return len(path) < longest
        ms, node_rows = self.cost.at(context), 1
        if self._even:  # a node of one sequence is a row of each
            node_rows, longest = sequences, self._longest(self.max_nodes // sequences)
        longest = min(longest, (len(ms) - sequences) // node_rows)
        known = list(path[:longest])
        last = known[-1] if known else 1.0
        whole = known + [last * acceptance_rate**further for further in range(1, longest - len(known) + 1)]
        reread_ms = list(reread_costs(whole, ms)) if self.limits.rereads else [0.0] * longest
        spent_ms = len(path) * draft_token_ms
        tokens = float(sequences)
        best = max(least_rate, MIN_SPEEDUP * tokens / (ms[sequences - 1] + spent_ms))
        for nodes, p in enumerate(whole, start=1):
            tokens += p
            if nodes > len(known):
                spent_ms += draft_token_ms
            rate = tokens / (ms[sequences + nodes * node_rows - 1] + reread_ms[nodes - 1] + spent_ms)
            if nodes <= len(known):
                best = max(best, rate)
            elif rate > best:
                return True
        return False

    def _longest(self, nodes: int) -> int:
        """Nodes of the longest chain that can be taken back, `nodes` at most."""
        return nodes if self.limits.depth is None else min(nodes, self.limits.depth)

    def rate(self, plan: Plan, context: int) -> float:
        """Expected tokens per millisecond of a plan, without reading top ids and without changing the row count, as
        `another_pays` calculates."""
        return plan.expected_tokens / (self.cost.at(context)[plan.rows - 1] + plan.reread_ms)

    def saved_share(self, acceptance_rate: float, pass_ms: float, context: int, sequences: int) -> float:
        """Share of the time of plain decoding that chains of the best fixed length save; negative where all lose.

        acceptance_rate  share of draft tokens that are accepted, given that those before them were
        pass_ms          time to draft one token for each of the sequences, milliseconds
        """
        ms = self.cost.at(context)
        if 2 * sequences > len(ms):
            return -1.0
        plain = ms[sequences - 1]
        best, tokens, p, reread_ms = -1.0, 1.0, 1.0, 0.0
        for length in range(1, self._longest(min(self.max_nodes, len(ms)) // sequences) + 1):
            rows = sequences * (1 + length)
            if rows > len(ms):
                break
            if self.limits.rereads:
                reread_ms += sequences * p * (1.0 - acceptance_rate) * ms[length - 1]
            p *= acceptance_rate
            tokens += p
            best = max(best, 1.0 - (ms[rows - 1] + reread_ms + length * pass_ms) / (tokens * plain))
        return best

    def saved_ms(self, plan: Plan, context: int, without: Set[int]) -> float:
        """Time that drafting is expected to save over plain decoding, had nodes of the buckets `without` not been
        drafted. A node whose parent is in `without` must be in it too. Reading top ids is not charged.
        """
        ranked, sequences = plan.ranked, len(plan.drafts)
        if without:
            buckets = [draft.buckets.tolist() for draft in plan.candidates]
            ranked = [entry for entry in ranked if buckets[entry[1]][entry[2]] not in without]
        if not ranked:
            return 0.0
        if self._even:
            paths = _paths(ranked, sequences)
            choice = best_length(paths, plan.ms, self.max_nodes, rereads=self.limits.rereads)
            rows, tokens, reread_ms = choice.rows, choice.tokens, choice.reread_ms
        else:
            count = _best_count(ranked, sequences, plan.ms, self.max_nodes)
            rows, reread_ms = sequences + count, 0.0
            tokens = sequences - sum(entry[0] for entry in ranked[:count])
        if rows == sequences:
            return 0.0
        ms = self.cost.at(context)
        change_ms = 0.0 if rows == plan.last_rows else plan.change_ms
        return ms[sequences - 1] * tokens / sequences - ms[rows - 1] - reread_ms - change_ms

    def learn(self, draft: Draft, emitted: Sequence[int]) -> None:
        """Compare a complete candidate draft, verified or not, with the emitted tokens."""
        if len(draft):
            self.table.learn(draft, emitted)


def best_nodes(
    drafts: Sequence[Draft], path_probabilities: Sequence[Sequence[float]], ms: Sequence[float], max_nodes: int
) -> tuple[list[RankedNode], int]:
    """The nodes of all drafts by falling path probability, and how many of them to verify.

    The n likeliest nodes always form subtrees, since no child is likelier than its parent, and have the largest sum of
    all sets of n nodes. So trying every n finds the maximum of (sequences + sum of path probabilities) / T(rows).
    `ms[r - 1]` is the cost of r rows.
    """
    ranked = _ranked(path_probabilities)
    return ranked, _best_count(ranked, len(drafts), ms, max_nodes)


def _ranked(paths: Sequence[Sequence[float]]) -> list[RankedNode]:
    return sorted((-p, place, node) for place, path in enumerate(paths) for node, p in enumerate(path))


def _paths(ranked: Sequence[RankedNode], sequences: int) -> list[list[float]]:
    """The path probabilities of each sequence's chain, from the root on, out of its ranked nodes."""
    paths: list[list[float]] = [[] for _ in range(sequences)]
    for negative, place, _ in ranked:
        paths[place].append(-negative)
    return paths


def _best_count(ranked: Sequence[RankedNode], sequences: int, ms: Sequence[float], max_nodes: int) -> int:
    best_count, tokens = 0, float(sequences)
    best_rate = MIN_SPEEDUP * tokens / ms[sequences - 1]
    for count in range(1, min(len(ranked), max_nodes, len(ms) - sequences) + 1):
        tokens -= ranked[count - 1][0]
        rate = tokens / ms[sequences + count - 1]
        if rate > best_rate:
            best_rate, best_count = rate, count
    return best_count


def _cut(draft: Draft, depth: int) -> Draft:
    """The nodes of a draft down to a depth."""
    depths = draft.depths().tolist()
    return (
        draft.select([node for node, d in enumerate(depths) if d <= depth]) if max(depths, default=0) > depth else draft
    )


def _likeliest_chains(
    drafts: Sequence[Draft], paths: Sequence[Sequence[float]]
) -> tuple[list[Draft], list[list[float]]]:
    """Reduce each tree to the root-to-leaf path with the largest sum of path probabilities."""
    nodes = [likeliest_path(draft.parents.tolist(), path) for draft, path in zip(drafts, paths, strict=True)]
    chains = [draft.select(chosen) for draft, chosen in zip(drafts, nodes, strict=True)]
    return chains, [[path[node] for node in chosen] for path, chosen in zip(paths, nodes, strict=True)]


def _subtree(draft: Draft, nodes: list[int]) -> Draft:
    if not nodes:
        return EMPTY
    return draft if len(nodes) == len(draft) else draft.select(sorted(nodes))
