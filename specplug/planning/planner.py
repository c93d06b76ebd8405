"""Chooses what to verify: for every sequence the subtree that pays best on this machine.

Knows drafts, learned acceptance and the measured cost curve. Knows neither tokens' meaning nor an engine.
Source: expected goodput as in SmartSpec (arXiv 2406.14066), with trees, measured costs and every n tried instead of a
fitted line; shadow scoring and discounted counts as in DEL (arXiv 2504.05598).
Keeps: two floats per bucket, one `Rest` per source.
Cost per step: about 1.5 us per candidate node.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import Protocol

from specplug.core import EMPTY, Draft
from specplug.drafts.trees import likeliest_path, path_probabilities
from specplug.planning.acceptance import AcceptanceTable

MARGIN = 1.02
"""Drafts are verified when they are expected to be this much faster than none: the choice favours guesses whose
probability is overestimated, and a tree's batch costs some Python."""

REST_LIMIT = 64
"""A source that never pays is still asked once in this many steps."""

REST_SHARE = 0.004
"""A source may cost this share of a plain step while it does not pay."""

DEAR_REST_SHARE = 0.01
"""The same of a dear source, one that costs passes of a model; where a try costs more than 0.64 of a step, REST_LIMIT
binds first."""

TRIALS = 8
"""So often a dear source is asked in a new text before it may rest, where it paid in the text before."""

DOUBT = 1.0
"""The mean of n askings is taken to be off by this share of a plain step over sqrt(n), in favour of a dear source."""

REFUSED_LIMIT = 7
"""A dear source that finds by the costs that no guess would pay waits so many steps at most: costs change slowly."""


class Cost(Protocol):
    """What the planner asks of a cost curve (`specplug.planning.cost.CostCurve` is one)."""

    limit: int
    change_ms: float

    def at(self, context: int) -> list[float]: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """The subtrees to verify, one per sequence (often EMPTY), and what was expected of them.

    rows            target rows: one per sequence and one per node
    expected_tokens accepted plus the target's own
    expected_ms     the pass, drafting excluded
    candidates      what the subtrees were chosen from
    ranked          the candidates' nodes, likeliest first
    ms              the costs by which they were chosen; `ms[r - 1]` is that of r rows
    change_ms       what of them changing the row count is, unless to `last_rows`
    """

    drafts: list[Draft]
    rows: int
    expected_tokens: float
    expected_ms: float
    candidates: Sequence[Draft] = ()
    ranked: Sequence[Ranked] = ()
    ms: Sequence[float] = ()
    change_ms: float = 0.0
    last_rows: int = 0


Ranked = tuple[float, int, int]
"""(-path probability, sequence, node)"""


def best_nodes(
    drafts: Sequence[Draft], path_probabilities: Sequence[Sequence[float]], ms: Sequence[float], max_nodes: int
) -> tuple[list[Ranked], int]:
    """The nodes of all drafts by falling path probability, and how many of them to verify.

    The n likeliest nodes always form subtrees, since no child is likelier than its parent; and they have the largest
    sum of all sets of n. So trying every n finds the optimum of (sequences + sum of path probabilities) / T(rows).
    `ms[r - 1]` is the cost of r rows.
    """
    ranked = [(-p, seq, node) for seq, line in enumerate(path_probabilities) for node, p in enumerate(line)]
    ranked.sort()
    return ranked, _best_count(ranked, len(drafts), ms, max_nodes)


def _best_count(ranked: Sequence[Ranked], sequences: int, ms: Sequence[float], max_nodes: int) -> int:
    best_count, tokens = 0, float(sequences)
    best_rate = MARGIN * tokens / ms[sequences - 1]
    for count in range(1, min(len(ranked), max_nodes, len(ms) - sequences) + 1):
        tokens -= ranked[count - 1][0]
        rate = tokens / ms[sequences + count - 1]
        if rate > best_rate:
            best_rate, best_count = rate, count
    return best_count


class Planner:
    """Plans the target passes of one engine, and learns from each.

    static=True verifies the `max_nodes` likeliest nodes whatever they cost: a setting to compare with.
    """

    def __init__(
        self, table: AcceptanceTable, cost: Cost, *, max_nodes: int, trees: bool = True, static: bool = False
    ) -> None:
        self.table = table
        self.cost = cost
        self.max_nodes = min(max_nodes, cost.limit - 1)
        self.trees = trees
        self.static = static

    def plan(self, drafts: Sequence[Draft], context: int, row_ms: float = 0.0, last_rows: int = 0) -> Plan:
        """Choose subtrees of `drafts` (one per running sequence).

        context    mean KV fill of the sequences, tokens
        row_ms     what every row costs beyond the target pass (reading its top ids), milliseconds
        last_rows  of the pass before: other counts cost a change, twice where that one was plain, since from there it
                   takes a second one to come back
        """
        sequences = len(drafts)
        ms = self.cost.at(context)
        change_ms = self.cost.change_ms * (2 if last_rows <= sequences else 1)
        if row_ms or change_ms:
            ms = [cost + row_ms * rows + change_ms for rows, cost in enumerate(ms, 1)]
            for rows in {sequences, last_rows} - {0}:
                if rows <= len(ms):
                    ms[rows - 1] -= change_ms
        nodes = sum(map(len, drafts))
        if not nodes or sequences >= len(ms):
            return Plan([EMPTY] * sequences, sequences, float(sequences), ms[min(sequences, len(ms)) - 1])
        probability = self.table.probability
        lines = [
            path_probabilities(draft.parents.tolist(), [probability[bucket] for bucket in draft.buckets.tolist()])
            for draft in drafts
        ]
        if not self.trees:
            drafts, lines = _likeliest_chains(drafts, lines)
        ranked, count = best_nodes(drafts, lines, ms, self.max_nodes)
        if self.static:
            count = min(len(ranked), self.max_nodes)
        if count == 0:
            return Plan(
                [EMPTY] * sequences,
                sequences,
                float(sequences),
                ms[sequences - 1],
                drafts,
                ranked,
                ms,
                change_ms,
                last_rows,
            )
        chosen: list[list[int]] = [[] for _ in drafts]
        tokens = float(sequences)
        for negative, seq, node in ranked[:count]:
            tokens -= negative
            chosen[seq].append(node)
        plans = [
            (draft if len(keep) == len(draft) else draft.select(sorted(keep))) if keep else EMPTY
            for draft, keep in zip(drafts, chosen, strict=True)
        ]
        expected_ms = ms[min(sequences + count, len(ms)) - 1]
        return Plan(plans, sequences + count, tokens, expected_ms, drafts, ranked, ms, change_ms, last_rows)

    def another_pays(self, line: Sequence[float], rate: float, guess_ms: float, context: int, sequences: int) -> bool:
        """Whether to guess on after a chain with the path probabilities `line`, where every guess takes `guess_ms`.

        It pays where some number of further guesses, each right in the share `rate` of cases, brings more tokens per
        millisecond than stopping here, or than verifying any part of the chain. What was guessed is paid for.
        """
        if self.static:
            return len(line) < self.max_nodes
        ms = self.cost.at(context)
        most = min(self.max_nodes, len(ms) - sequences)
        spent_ms = len(line) * guess_ms
        tokens = float(sequences)
        best = MARGIN * tokens / (ms[sequences - 1] + spent_ms)
        for nodes, p in enumerate(line[:most], start=1):
            tokens += p
            best = max(best, tokens / (ms[sequences + nodes - 1] + spent_ms))
        p = line[-1] if line else 1.0
        for nodes in range(len(line) + 1, most + 1):
            p *= rate
            tokens += p
            spent_ms += guess_ms
            if tokens / (ms[sequences + nodes - 1] + spent_ms) > best:
                return True
        return False

    def saved_ms(self, plan: Plan, context: int, without: Set[int]) -> float:
        """What drafting was expected to save over plain decoding, had nodes of the buckets `without` not been guessed.

        A node's children must be in `without` where it is. The cost of reading top ids is not in it.
        """
        ranked, sequences = plan.ranked, len(plan.drafts)
        if without:
            buckets = [draft.buckets.tolist() for draft in plan.candidates]
            ranked = [entry for entry in ranked if buckets[entry[1]][entry[2]] not in without]
        count = _best_count(ranked, sequences, plan.ms, self.max_nodes) if ranked else 0
        if not count:
            return 0.0
        ms = self.cost.at(context)
        accepted = -sum(entry[0] for entry in ranked[:count])
        change_ms = 0.0 if sequences + count == plan.last_rows else plan.change_ms
        return ms[sequences - 1] * (1.0 + accepted / sequences) - ms[sequences + count - 1] - change_ms

    def learn(self, draft: Draft, emitted: Sequence[int]) -> None:
        """Shadow-score a whole candidate draft, verified or not, against what came."""
        if len(draft):
            self.table.learn(draft, emitted)


@dataclass(slots=True)
class Rest:
    """When to ask a source: always while it pays, ever more rarely while it does not.

    dear    what it costs differs from step to step as much as what it saves: judged by the mean of several
    gain_ms what it gained, of late, per asking in this text
    trials  of a dear source: how often it is still asked before it may rest
    shy     how long it last waited because no guess would pay
    """

    dear: bool = False
    cost_ms: float = 0.0
    gain_ms: float = 0.0
    seen: int = 0
    trials: int = TRIALS
    promise: int = TRIALS
    waiting: int = 0
    interval: int = 0
    shy: int = 0
    asked: int = field(default=0)

    def new_text(self) -> None:
        """A dear source gets a new chance: a large one where it paid last, a small one where it did not."""
        if self.dear:
            if self.seen:
                self.promise = TRIALS if self.gain_ms > 0 else max(2, self.promise // 2)
            self.trials, self.waiting, self.interval, self.shy, self.seen = self.promise, 0, 0, 0, 0

    def due(self) -> bool:
        """Count one step; True when the source should be asked in it."""
        if self.waiting > 0:
            self.waiting -= 1
            return False
        return True

    def used(self, ms: float, saved_ms: float, plain_ms: float) -> None:
        """The source was asked at a cost of `ms`; its guesses should save `saved_ms`, those of a dear one did."""
        self.asked += 1
        self.shy = 0
        self.cost_ms += (ms - self.cost_ms) * (0.2 if self.asked > 5 else 1 / self.asked)
        if self._gained(ms, saved_ms, plain_ms) if self.dear else saved_ms > self.cost_ms:
            self.interval = 0
        else:
            share = DEAR_REST_SHARE if self.dear else REST_SHARE
            longest = min(REST_LIMIT, ceil(self.cost_ms / (share * plain_ms)) - 1)
            self.interval = max(0, min(2 * self.interval + 1, longest))
        self.waiting = self.interval

    def refused(self) -> None:
        """The source was asked, and did not try, since no guess would pay."""
        self.shy = min(2 * self.shy + 1, REFUSED_LIMIT)
        self.waiting = max(self.shy, self.interval)

    def _gained(self, ms: float, saved_ms: float, plain_ms: float) -> bool:
        """Whether a dear source gains by the mean of several askings, which of few of them is doubtful."""
        self.seen += 1
        self.trials -= 1
        weight = 0.5 if self.interval else max(0.05, 1 / self.seen)  # after a rest, the old says little
        self.gain_ms += (saved_ms - ms - self.gain_ms) * weight
        return self.gain_ms > -DOUBT * plain_ms / sqrt(self.seen) or self.trials >= 0


def _likeliest_chains(
    drafts: Sequence[Draft], lines: Sequence[Sequence[float]]
) -> tuple[list[Draft], list[list[float]]]:
    """Reduce each tree to the root-to-leaf path with the largest sum of path probabilities."""
    paths = [likeliest_path(draft.parents.tolist(), line) for draft, line in zip(drafts, lines, strict=True)]
    chains = [draft.select(path) for draft, path in zip(drafts, paths, strict=True)]
    return chains, [[line[node] for node in path] for line, path in zip(lines, paths, strict=True)]
