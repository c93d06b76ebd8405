"""One step's speculation for all running sequences: ask the sources that pay, plan, and learn from what came.

Knows proposers, the planner and the clock. Knows no engine: llama.cpp's loop, vLLM's worker and the replay of traces
drive the same object.
Keeps: the candidate drafts of the step under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specplug.core import EMPTY, Draft, IntArray, Requires, Steered, Step
from specplug.drafts.trees import path_probabilities
from specplug.planning.acceptance import AcceptanceTable
from specplug.planning.back_off import BackOff
from specplug.planning.constants import TOPK_COST_WEIGHT
from specplug.planning.cost import CostCurve
from specplug.planning.fusion import Fusion
from specplug.planning.planner import Plan, Planner
from specplug.profile import Profile


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
        self.requires: Requires = fusion.requires
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
        self._back_offs = [BackOff(expensive=isinstance(source, Steered)) for source in fusion.sources]
        self._passes = [source.passes if isinstance(source, Steered) else 0 for source in fusion.sources]
        self.asked: list[int] = []
        """The sources, by index, that were asked in the step under way."""
        self._always = self.planner.static
        self._silent = not fusion.buckets  # a source without buckets never drafts
        self._candidates: list[Draft] = []
        self._plan = Plan([], 0, 0.0, 0.0)
        self._context = 0
        self._last_rows = 0
        """Of the pass before, where it was timed; else 0."""
        self._chosen_rows = 0
        """The same of the last pass that was not plain because a plain one was due."""
        self._plain_due = False
        self._ask_ns = [0] * len(fusion.sources)
        self._plan_ns = 0
        self._topk_row_ms = 0.0
        self.wants_topk = 0
        """How many top ids per row `observe` should be given in the step under way; 0 for none."""
        self._sequences = 1
        for index, source in enumerate(fusion.sources):
            if isinstance(source, Steered):
                self._steer(source, fusion.first(index))

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._last_rows = self._chosen_rows = 0  # reading its prompt was a pass of another shape
        for rest in self._back_offs:
            rest.start_text()
        self.fusion.begin(seq, prompt)

    def end(self, seq: int) -> None:
        self.fusion.end(seq)

    def plan(self, seqs: Sequence[int], context: int, budgets: Sequence[int]) -> list[Draft]:
        """The subtree to verify for each of `seqs`.

        context  mean KV fill of the sequences, tokens
        budgets  most nodes for each sequence (what is left of its token limit), >= 0
        """
        self._context, self._sequences = context, len(seqs)
        if self._silent:
            return [EMPTY] * len(seqs)
        # A pass is timed where the one before was: not while a prompt is being read beside.
        self._plain_due = not self._always and len(seqs) == 1 and self._last_rows > 0 and self.cost.plain_due
        self.asked = [
            i for i, rest in enumerate(self._back_offs) if self._always or (rest.tick() and not self._plain_due)
        ]
        if not self.asked:
            self.wants_topk = 0
            self._candidates = []
            self._plan = Plan([EMPTY] * len(seqs), len(seqs), 0.0, 0.0)
            return self._plan.drafts
        began = self.fusion.clock()
        limit = self.planner.max_nodes
        active = [i in self.asked for i in range(len(self._back_offs))]
        self._ask_ns = [0] * len(self._back_offs)
        self._candidates = [
            self.fusion.propose_from(seq, min(limit, budget), active, self._ask_ns)
            for seq, budget in zip(seqs, budgets, strict=True)
        ]
        self.wants_topk = max(self.fusion.sources[i].requires.topk for i in self.asked)
        row_ms = self._topk_row_ms if self.wants_topk else 0.0
        self._plan = self.planner.plan(self._candidates, context, row_ms, self._chosen_rows)
        self._plan_ns = self.fusion.clock() - began - sum(self._ask_ns)
        return self._plan.drafts

    def observe(self, seqs: Sequence[int], steps: Sequence[Step], *, target_ms: float | None, topk_ns: int = 0) -> None:
        """Learn from one target pass that took `target_ms`; `topk_ns` is what reading the top ids took.

        target_ms  None where other rows were in the pass, as those of a prompt: it says nothing about the cost curve
        """
        if self._silent:
            return
        began = self.fusion.clock()
        for seq, step in zip(seqs, steps, strict=True):
            self.fusion.observe(seq, step)
        rows = len(seqs) + sum(len(step.draft) for step in steps)
        if target_ms is not None:
            self.cost.observe(rows, self._context, target_ms, rows != self._last_rows, len(seqs))
        self._last_rows = rows if target_ms is not None else 0
        if not self._plain_due or not self._last_rows:
            self._chosen_rows = self._last_rows
        if not self._candidates:
            return
        for candidate, step in zip(self._candidates, steps, strict=True):
            self.planner.learn(candidate, step.emitted)
        if self._always:
            return
        if self.wants_topk:
            self._topk_row_ms += (topk_ns / 1e6 / rows - self._topk_row_ms) * TOPK_COST_WEIGHT
        self._tally(steps, self._plan_ns + self.fusion.clock() - began, topk_ns)

    def _steer(self, source: Steered, first: int) -> None:
        """Let a source ask before every guess whether it pays; `first` is where its buckets begin."""

        def pays(chain: Sequence[int], rate: float) -> bool:
            probability = self.table.probability
            line = path_probabilities(range(-1, len(chain) - 1), [probability[first + bucket] for bucket in chain])
            return self.planner.another_pays(line, rate, source.guess_ms, self._context, self._sequences)

        source.pays = pays

    def _tally(self, steps: Sequence[Step], common_ns: int, topk_ns: int) -> None:
        """Tell every source that was asked whether it gained more time than asking it took.

        What several guessed is credited to the cheapest of them, so that a dear source must find what others do not.
        """
        sequences = len(steps)
        plain_ms = self.cost.at(self._context)[min(sequences, self.cost.limit) - 1]
        readers = sum(self.fusion.sources[i].requires.topk > 0 for i in self.asked)
        order = sorted(self.asked, key=lambda i: self._back_offs[i].cost_ms)
        credited = 0.0
        for place, source in enumerate(order, start=1):
            others = frozenset[int]().union(*(self.fusion.own_buckets[i] for i in order[place:]))
            saved_ms = self.planner.saved_ms(self._plan, self._context, others)
            ns = self._ask_ns[source] + common_ns / len(order)
            if self.fusion.sources[source].requires.topk:
                ns += topk_ns / readers
            rest = self._back_offs[source]
            if not rest.expensive:
                rest.record(ns / 1e6, saved_ms - credited, plain_ms)
            elif self._ran(source):
                rest.record(ns / 1e6, self._came_ms(source, steps), plain_ms)
            else:
                rest.decline()
            credited = saved_ms

    def _ran(self, index: int) -> bool:
        """Whether a dear source has tried to guess since this was asked last, at the end of the last step it was in."""
        source = self.fusion.sources[index]
        assert isinstance(source, Steered)
        before, self._passes[index] = self._passes[index], source.passes
        return source.passes > before

    def _came_ms(self, source: int, steps: Sequence[Step]) -> float:
        """What a source's guesses saved in this pass, or lost: of dear mistakes, what was expected says too little."""
        owner = self.fusion.bucket_source
        ms, sequences = self.cost.at(self._context), len(steps)
        owners = [owner[step.draft.buckets].tolist() for step in steps]
        nodes = sum(map(len, owners))
        if not nodes:
            return 0.0
        own = sum(line.count(source) for line in owners)
        accepted = sum(line[node] == source for line, step in zip(owners, steps, strict=True) for node in step.accepted)
        extra_ms = ms[min(sequences + nodes, len(ms)) - 1] - ms[sequences - 1]
        return float(ms[sequences - 1] * accepted / sequences - extra_ms * own / nodes)
