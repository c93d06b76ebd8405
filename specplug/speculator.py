"""One step's speculation for all running sequences: ask the sources that pay, plan, and learn from what came.

Knows proposers, the planner and the clock. Knows no engine: llama.cpp's loop, vLLM's worker and the replay of traces
drive the same object.
Keeps: the candidate drafts of the step under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specplug.acceptance import AcceptanceTable
from specplug.core import EMPTY, Draft, IntArray, Needs, Step
from specplug.cost import CostCurve
from specplug.planner import Plan, Planner, Rest
from specplug.profile import Profile
from specplug.proposers.fusion import Fusion

SMOOTHING = 0.1
"""Weight of a new timing in the running mean of what a top-k row costs."""


class Speculator:
    """Drafts for one engine. Call `plan`, run the target, then `observe`, once per step."""

    def __init__(
        self,
        fusion: Fusion,
        cost: CostCurve,
        profile: Profile,
        *,
        learned: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """`learned` is a bucket table (hits, misses) to start from, by bucket name."""
        self.fusion = fusion
        self.needs: Needs = fusion.needs
        self.cost = cost
        self.table = AcceptanceTable(fusion.buckets, learned)
        fusion.probability = self.table.probability  # the same list: fusion merges by what was learned
        planner = profile.planner
        self.planner = Planner(
            self.table,
            cost,
            max_nodes=planner.max_nodes,
            trees=planner.trees,
            static=planner.mode == "static",
        )
        self._source_of: list[int] = fusion.bucket_source.tolist()
        self._rests = [Rest() for _ in fusion.sources]
        self._active = [True] * len(fusion.sources)
        self._always = self.planner.static
        self._silent = not fusion.buckets  # a source without buckets never drafts
        self._candidates: list[Draft] = []
        self._plan = Plan([], 0, 0.0, 0.0)
        self._context = 0
        self._ask_ns = [0] * len(fusion.sources)
        self._topk_row_ms = 0.0
        self.wants_topk = 0
        """How many top ids per row `observe` should be given in the step under way; 0 for none."""

    def begin(self, seq: int, prompt: IntArray) -> None:
        self.fusion.begin(seq, prompt)

    def end(self, seq: int) -> None:
        self.fusion.end(seq)

    def plan(self, seqs: Sequence[int], context: int, budgets: Sequence[int]) -> list[Draft]:
        """The subtree to verify for each of `seqs`.

        context  mean KV fill of the sequences, tokens
        budgets  most nodes for each sequence (what is left of its token limit), >= 0
        """
        self._context = context
        if self._silent:
            return [EMPTY] * len(seqs)
        self._active = [self._always or rest.due() for rest in self._rests]
        if not any(self._active):
            self.wants_topk = 0
            self._candidates = []
            self._plan = Plan([EMPTY] * len(seqs), len(seqs), 0.0, 0.0)
            return self._plan.drafts
        limit = self.planner.max_nodes
        self._ask_ns = [0] * len(self._rests)
        self._candidates = [
            self.fusion.propose_from(seq, min(limit, budget), self._active, self._ask_ns)
            for seq, budget in zip(seqs, budgets, strict=True)
        ]
        self.wants_topk = max(
            (s.needs.topk for s, active in zip(self.fusion.sources, self._active, strict=True) if active), default=0
        )
        self._plan = self.planner.plan(self._candidates, context, self._topk_row_ms if self.wants_topk else 0.0)
        return self._plan.drafts

    def observe(self, seqs: Sequence[int], steps: Sequence[Step], *, target_ms: float, topk_ns: int = 0) -> None:
        """Learn from one target pass that took `target_ms`; `topk_ns` is what reading the top ids took."""
        if self._silent:
            return
        started = self.fusion.clock()
        for seq, step in zip(seqs, steps, strict=True):
            self.fusion.observe(seq, step)
        rows = len(seqs) + sum(len(step.draft) for step in steps)
        self.cost.observe(rows, self._context, target_ms)
        if not self._candidates:
            return
        for candidate, step in zip(self._candidates, steps, strict=True):
            self.planner.learn(candidate, step.emitted)
        if self._always:
            return
        if self.wants_topk:
            self._topk_row_ms += (topk_ns / 1e6 / rows - self._topk_row_ms) * SMOOTHING
        spent_ns = self.fusion.clock() - started + topk_ns
        self._tally(len(seqs), spent_ns)

    def _tally(self, sequences: int, after_ns: int) -> None:
        """Tell every source that was asked whether the plan gained more time than the asking took."""
        plain_ms = self.cost.at(self._context)[min(sequences, self.cost.limit) - 1]
        gain_ms = self._plan.expected_tokens / sequences * plain_ms - self._plan.expected_ms
        used = {self._source_of[bucket] for draft in self._plan.drafts for bucket in draft.buckets.tolist()}
        asked = sum(self._active)
        for source, rest in enumerate(self._rests):
            if self._active[source]:
                needs_topk = self.fusion.sources[source].needs.topk > 0
                ms = (self._ask_ns[source] + (after_ns if needs_topk or not self.wants_topk else 0) / asked) / 1e6
                rest.used(ms, source in used and gain_ms > rest.cost_ms, plain_ms)
