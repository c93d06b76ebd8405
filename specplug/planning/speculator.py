"""One step of speculation for all running sequences: ask the proposers, plan the target pass, learn from its result.

It drafts trees for a few sequences; `batch_speculator.py` drafts chains for many. It does not depend on an engine: the
step loop of llama.cpp and the replay of recorded answers drive the same object.
State: the candidate drafts of the current step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specplug.core import EMPTY, NO_LIMITS, Draft, DraftLimits, IntArray, ModelBased, Requires, Step
from specplug.drafts.trees import path_probabilities
from specplug.planning.acceptance import AcceptanceTable
from specplug.planning.constants import TOPK_COST_WEIGHT
from specplug.planning.cost import CostCurve
from specplug.planning.fusion import Fusion
from specplug.planning.planner import Plan, Planner
from specplug.planning.proposer_selection import ProposerSelection
from specplug.profile import Profile


class Speculator:
    """Drafts for one engine. Call `plan`, run the target pass, then call `observe`, once per step."""

    def __init__(
        self,
        fusion: Fusion,
        cost: CostCurve,
        profile: Profile,
        *,
        limits: DraftLimits = NO_LIMITS,
        learned: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """
        limits   limits of the target's memory for a draft
        learned  maps bucket names to the (hits, misses) to start from
        """
        self.fusion = fusion
        self.requires: Requires = fusion.requires
        self.cost = cost
        self.table = AcceptanceTable(fusion.buckets, learned)
        fusion.probability = self.table.probability  # the same list: the fusion merges by what was learned
        settings = profile.planner
        self._static = settings.mode == "static"
        self.planner = Planner(
            self.table,
            cost,
            max_nodes=settings.max_nodes,
            trees=settings.trees,
            static=self._static,
            limits=limits,
        )
        self.selection = ProposerSelection(fusion.sources, fusion.clock, static=self._static)
        self.wants_topk = 0
        """How many top ids per row `observe` should receive in the current step; 0 for none."""
        self._never_drafts = not fusion.buckets
        self._candidates: list[Draft] = []
        self._plan = Plan([], 0, 0.0, 0.0)
        self._plan_ns = 0
        self._context = 0
        self._num_sequences = 1
        self._last_rows = 0
        """Rows of the pass before, if it was timed; else 0."""
        self._last_planned_rows = 0
        """The same of the last pass that was not an inserted plain one."""
        self._plain_due = False
        self._topk_row_ms = 0.0
        self._model_based = [(i, source) for i, source in enumerate(fusion.sources) if isinstance(source, ModelBased)]
        for index, source in self._model_based:
            self._provide_pays(source, fusion.first(index))

    def begin(self, seq: int, prompt: IntArray) -> None:
        self.note_other_pass()  # reading the prompt
        self.selection.start_text()
        self.fusion.begin(seq, prompt)

    def end(self, seq: int) -> None:
        self.fusion.end(seq)

    def note_other_pass(self) -> None:
        """Record that a pass of another shape ran, such as one for a prompt: the next one does not repeat its shape."""
        self._last_rows = self._last_planned_rows = 0

    def plan(
        self, seqs: Sequence[int], context: int, budgets: Sequence[int], remaining: Sequence[int] | None = None
    ) -> list[Draft]:
        """The subtree to verify for each of `seqs`.

        context    mean KV cache fill of the sequences, tokens
        budgets    most nodes for each sequence, >= 0: a draft of n nodes can emit n + 1 tokens
        remaining  most tokens that each sequence may still emit; None if its budget is the limit
        """
        self._context, self._num_sequences = context, len(seqs)
        if self._never_drafts:
            return [EMPTY] * len(seqs)
        # A plain pass is inserted only if it will probably be timed, as the previous one was; so not beside a prompt.
        self._plain_due = not self._static and len(seqs) == 1 and self._last_rows > 0 and self.cost.plain_due
        if not self.selection.select(plain_due=self._plain_due):
            self.wants_topk = 0
            self._candidates = []
            self._plan = Plan([EMPTY] * len(seqs), len(seqs), 0.0, 0.0)
            return self._plan.drafts
        limit = self.planner.max_nodes
        self._candidates = self.fusion.propose_all(
            seqs,
            [min(limit, budget) for budget in budgets],
            self._active(seqs, budgets if remaining is None else remaining),
            self.selection.spent_ns,
        )
        self.wants_topk = self.selection.topk()
        row_ms = self._topk_row_ms if self.wants_topk else 0.0
        self._plan = self.planner.plan(self._candidates, context, row_ms, self._last_planned_rows)
        self._plan_ns = self.selection.common_ns()
        return self._plan.drafts

    def observe(self, seqs: Sequence[int], steps: Sequence[Step], *, target_ms: float | None, topk_ns: int = 0) -> None:
        """Learn from one target pass.

        target_ms  time of the pass, without the price in `limits`; None if the pass also had other rows, such as those
                   of a prompt, so that it is no point of the cost curve
        topk_ns    time that reading the top ids took
        """
        if self._never_drafts:
            return
        began_ns = self.fusion.clock()
        for seq, step in zip(seqs, steps, strict=True):
            self.fusion.observe(seq, step)
        rows = len(seqs) + sum(len(step.draft) for step in steps)
        if target_ms is not None:
            self.cost.observe(rows, self._context, target_ms, rows != self._last_rows, len(seqs))
        self._last_rows = rows if target_ms is not None else 0
        if not self._plain_due or not self._last_rows:
            self._last_planned_rows = self._last_rows
        if not self._candidates:
            return
        for candidate, step in zip(self._candidates, steps, strict=True):
            self.planner.learn(candidate, step.emitted)
        if self._static:
            return
        if self.wants_topk:
            self._topk_row_ms += (topk_ns / 1e6 / rows - self._topk_row_ms) * TOPK_COST_WEIGHT
        self.selection.credit(
            common_ns=self._plan_ns + self.fusion.clock() - began_ns,
            topk_ns=topk_ns,
            plain_ms=self._plain_ms(len(seqs)),
            expected_ms=self._expected_ms,
            measured_ms=lambda index: self._measured_ms(index, steps),
        )

    def _active(self, seqs: Sequence[int], remaining: Sequence[int]) -> list[Sequence[int]]:
        """Per proposer the places in `seqs` for which it is asked.

        A model-based proposer is not asked for a sequence where that costs more than any draft can still save.
        """
        asked = self.selection.asked
        every = range(len(seqs))
        active: list[Sequence[int]] = [every if index in asked else () for index in range(len(self.fusion.sources))]
        if self._static or not seqs:
            return active
        for index, source in self._model_based:
            if index in asked:
                token_ms = self._plain_ms(len(seqs)) / len(seqs)
                active[index] = [
                    place for place in every if source.asking_ms(seqs[place]) <= remaining[place] * token_ms
                ]
        return active

    def _plain_ms(self, sequences: int) -> float:
        """Time of a plain pass at the current context."""
        return self.cost.at(self._context)[min(sequences, self.cost.limit) - 1]

    def _provide_pays(self, source: ModelBased, first: int) -> None:
        """Let a proposer ask before each draft token whether it pays; `first` is the index of its first bucket."""

        def pays(chain: Sequence[int], acceptance_rate: float) -> bool:
            probability = self.table.probability
            path = path_probabilities(range(-1, len(chain) - 1), [probability[first + bucket] for bucket in chain])
            token_ms = source.draft_token_ms
            return self.planner.another_pays(path, acceptance_rate, token_ms, self._context, self._num_sequences)

        source.pays = pays

    def _expected_ms(self, without: Sequence[int]) -> float:
        """Time that the plan is expected to save, had the proposers `without` not drafted."""
        buckets = frozenset[int]().union(*(self.fusion.own_buckets[index] for index in without))
        return self.planner.saved_ms(self._plan, self._context, buckets)

    def _measured_ms(self, index: int, steps: Sequence[Step]) -> float:
        """Time that the draft tokens of one proposer saved in this pass, negative where they lost.

        For an expensive proposer the expectation is not enough, as its mistakes are expensive, too.
        """
        owner = self.fusion.bucket_source
        ms, sequences = self.cost.at(self._context), len(steps)
        owners = [owner[step.draft.buckets].tolist() for step in steps]
        nodes = sum(map(len, owners))
        if not nodes:
            return 0.0
        own = sum(line.count(index) for line in owners)
        accepted = sum(line[node] == index for line, step in zip(owners, steps, strict=True) for node in step.accepted)
        extra_ms = ms[min(sequences + nodes, len(ms)) - 1] - ms[sequences - 1] + self.planner.limits.price_ms
        return float(ms[sequences - 1] * accepted / sequences - extra_ms * own / nodes)
