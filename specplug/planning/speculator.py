"""One step of speculation for all running sequences: ask the proposers, plan the target pass, learn from its result.

It drafts trees for a few sequences; `batch_speculator.py` drafts chains for many. It does not depend on an engine: the
step loop of llama.cpp and the replay of recorded answers drive the same object.
State: the candidate drafts of the current step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

from specplug.core import (
    EMPTY,
    NO_LIMITS,
    NO_OPTIONS,
    Draft,
    DraftLimits,
    IntArray,
    ModelBased,
    Requires,
    SequenceOptions,
    Step,
    TokenConstraint,
)
from specplug.planning.acceptance import AcceptanceTable
from specplug.planning.constants import LEARNING_RESERVE, LEARNING_SHARE, TOPK_COST_WEIGHT
from specplug.planning.cost import CostCurve
from specplug.planning.drafter_use import DrafterUse
from specplug.planning.even_chains import reread_ms
from specplug.planning.experience import Experience
from specplug.planning.exploration import Exploration
from specplug.planning.fusion import Drafts, Fusion
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
        experience: Mapping[int, Experience] | None = None,
    ) -> None:
        """
        limits      limits of the target's memory for a draft
        learned     maps bucket names to the (hits, misses) to start from
        experience  with earlier texts, by the index of a model-based proposer; it is continued
        """
        self.fusion = fusion
        self.requires: Requires = fusion.requires
        self.cost = cost
        self.table = AcceptanceTable(fusion.buckets, learned)
        fusion.probability = self.table.probability  # the same list: the fusion merges by what was learned
        settings = profile.planner
        fusion.prune_top_k = settings.prune_top_k
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
        self.drafter_uses: dict[int, DrafterUse] = {}
        """How the model-based proposers are used, by their index."""
        for index, source in enumerate(fusion.sources):
            if isinstance(source, ModelBased):
                own = (experience or {}).get(index) or Experience()
                self.drafter_uses[index] = self._use(source, fusion.first(index), own)
        self._active: list[Sequence[int]] = []
        self._unobserved: list[tuple[Sequence[int], Sequence[Step], float]] = []
        """Steps in which no proposer was asked, which they have yet to observe, with the time of a plain pass."""
        self._running = 0
        self._may_verify = True
        self._learning_ms = 0.0
        """Time that drafts may lose in a batch, by what earlier ones have saved and lost."""
        self._exploration = Exploration(self.planner)

    def use_cost(self, cost: CostCurve) -> None:
        """Plan with another curve of the same limit from now on, as the engine computes with other resources."""
        self.cost = self.planner.cost = cost
        self.note_other_pass()

    def begin(
        self,
        seq: int,
        prompt: IntArray,
        options: SequenceOptions = NO_OPTIONS,
        constraint: TokenConstraint | None = None,
    ) -> None:
        """`constraint` is that of the sequence's request, after the last token of the prompt; it is handed over."""
        self.note_other_pass()  # reading the prompt
        self._hand_over()
        if not self._running:  # beside other sequences a back-off goes on
            self.selection.start_text()
        self._running += 1
        self.fusion.begin(seq, prompt, options, constraint)
        for use in self.drafter_uses.values():
            use.begin(seq, prompt, private=options.private)

    def end(self, seq: int) -> None:
        self._hand_over()
        self._running -= 1
        self.fusion.end(seq)
        for use in self.drafter_uses.values():
            use.end(seq)

    def note_other_pass(self) -> None:
        """Record that a pass of another shape ran, such as one for a prompt: the next one does not repeat its shape."""
        self._last_rows = self._last_planned_rows = 0

    def plan(
        self,
        seqs: Sequence[int],
        context: int,
        budgets: Sequence[int],
        remaining: Sequence[int] | None = None,
        *,
        beside_prompts: bool = False,
    ) -> list[Draft]:
        """The subtree to verify for each of `seqs`.

        context         mean KV cache fill of the sequences, tokens
        budgets         most nodes for each sequence, >= 0: a draft of n nodes can emit n + 1 tokens
        remaining       most tokens that each sequence may still emit; None if its budget is the limit
        beside_prompts  whether the target reads prompts of other sequences, which should not wait for a drafter
        """
        self._context, self._num_sequences = context, len(seqs)
        self._exploration.forget_trial()
        if self._never_drafts:
            return [EMPTY] * len(seqs)
        # A plain pass is inserted only if it will probably be timed, as the previous one was; so not beside a prompt.
        self._plain_due = not self._static and len(seqs) == 1 and self._last_rows > 0 and self.cost.plain_due
        unscaled = not self._static and self.cost.is_unscaled
        if not self.selection.select(plain_due=self._plain_due or unscaled, idle=self.fusion.idle(seqs)):
            return self._plan_plain(len(seqs))
        for use in self.drafter_uses.values():
            use.reading_ns = 0
        if self._unobserved:
            self._hand_over()
            self.selection.start_clock()
        self._may_verify = self._static or len(seqs) == 1 or self._learning_ms >= 0
        self._propose(seqs, budgets, budgets if remaining is None else remaining, may_read=not beside_prompts)
        if seqs and not self._candidates:
            self.selection.decline()
            return self._plan_plain(len(seqs))
        if not self._may_verify:
            self._plan = replace(self._plan, drafts=[EMPTY] * len(seqs), rows=len(seqs))
        elif not self._static and not beside_prompts:  # else the pass would not be timed
            self._plan = self._exploration.better_known(
                self._plan, self._context, self._row_ms, self._last_planned_rows
            )
        reading_ns = sum(use.reading_ns for use in self.drafter_uses.values())
        self._plan_ns = self.selection.common_ns() - reading_ns
        return self._plan.drafts

    def observe(self, seqs: Sequence[int], steps: Sequence[Step], *, target_ms: float | None, topk_ns: int = 0) -> None:
        """Learn from one target pass.

        target_ms  time of the pass, without evaluating rows once more; None if the pass also had other rows, such as
                   those of a prompt, so that it is no point of the cost curve
        topk_ns    time that reading the top ids took
        """
        if self._never_drafts:
            return
        began_ns = self.fusion.clock()
        if self.selection.asked:
            self._let_observe(seqs, steps)
        rows = self.planner.limits.rows([step.draft for step in steps])
        if target_ms is not None:
            self.cost.observe(rows, self._context, target_ms, rows != self._last_rows, len(seqs))
            ms = target_ms + self._reread_ms(steps)
            self._exploration.charge(sum(len(step.emitted) for step in steps), ms, self._plain_ms(len(seqs)))
        self._last_rows = rows if target_ms is not None else 0
        if not self._plain_due or not self._last_rows:
            self._last_planned_rows = self._last_rows
        plain_ms = self._plain_ms(len(seqs))
        if not self.selection.asked:
            # After a pass, the processor's caches hold weights: code that runs once for many steps is faster.
            self._unobserved.append((tuple(seqs), steps, plain_ms))
            return
        for candidate, step in zip(self._candidates, steps, strict=True):
            self.planner.learn(candidate, step.emitted)
        asked = self._asked_drafters() if not self._static else []
        saved_ms = {index: self._measured_ms(index, steps) for index in asked if self._active[index]}
        self._learn_drafter_uses(seqs, steps, plain_ms, saved_ms)
        if self._static:
            return
        if self.wants_topk:
            self._topk_row_ms += (topk_ns / 1e6 / rows - self._topk_row_ms) * TOPK_COST_WEIGHT
        common_ns = self._plan_ns + self.fusion.clock() - began_ns
        if len(seqs) > 1:
            draft_ms = (common_ns + sum(self.selection.spent_ns)) / 1e6
            self._charge_batch(
                steps, plain_ms, None if target_ms is None else target_ms + self._reread_ms(steps) + draft_ms
            )
        self.selection.credit(
            common_ns=common_ns,
            topk_ns=topk_ns,
            plain_ms=plain_ms,
            expected_ms=self._expected_ms,
            measured_ms=lambda index: sum(saved_ms.get(index, ())),
            occupied=[index for index in asked if self.drafter_uses[index].reading_ns],
        )

    def _plan_plain(self, sequences: int) -> list[Draft]:
        """The plan of a step in which no proposer is asked."""
        self.wants_topk = 0
        self._candidates = []
        self._plan = _plain_plan(sequences)
        return self._plan.drafts

    def _none_would_draft(self) -> bool:
        """Whether all proposers that are asked are model-based ones that neither draft nor read.

        A batch has to be charged in every step, so that drafts are verified again later.
        """
        uses = self.drafter_uses
        return (
            self._num_sequences == 1
            and not self._static
            and all(
                index in uses and not self._active[index] and not uses[index].reading_ns
                for index in self.selection.asked
            )
        )

    def _let_observe(self, seqs: Sequence[int], steps: Sequence[Step]) -> None:
        for seq, step in zip(seqs, steps, strict=True):
            self.fusion.observe(seq, step)

    def _hand_over(self) -> None:
        """Let the proposers observe the steps in which none was asked."""
        unobserved, self._unobserved = self._unobserved, []
        for seqs, steps, plain_ms in unobserved:
            self._let_observe(seqs, steps)
            self._learn_drafter_uses(seqs, steps, plain_ms, {})

    def _propose(
        self, seqs: Sequence[int], budgets: Sequence[int], remaining: Sequence[int], *, may_read: bool
    ) -> None:
        """Ask the proposers, and plan; there are no candidates where `_none_would_draft`.

        Model-based proposers are asked last, where they can do better than the others.
        """
        fusion, asked = self.fusion, self.selection.asked
        budgets = [min(self.planner.max_nodes, budget) for budget in budgets]
        self._active = [fusion.places(index, seqs) if index in asked else () for index in range(len(fusion.sources))]
        found: list[Drafts] = [[] for _ in seqs]
        for index in asked:
            if index not in self.drafter_uses:
                fusion.ask(index, seqs, budgets, self._active[index], found, self.selection.spent_ns)
        self.wants_topk = self.selection.topk()
        self._candidates, self._plan = [], _plain_plan(len(seqs))
        if any(index not in self.drafter_uses for index in asked):
            self._plan_candidates(fusion.merge(seqs, found, budgets))
        for index in self._asked_drafters() if seqs else []:
            if not self._static:
                use = self.drafter_uses[index]
                self._active[index] = (
                    use.places(seqs, remaining, self._context, self._plain_ms(len(seqs)), self._plan, may_read=may_read)
                    if self._may_verify
                    else ()
                )
            fusion.ask(index, seqs, budgets, self._active[index], found, self.selection.spent_ns)
            if self._active[index]:
                self._plan_candidates(fusion.merge(seqs, found, budgets))
        if not self._candidates and not self._none_would_draft():
            self._plan_candidates(fusion.merge(seqs, found, budgets))

    def _plan_candidates(self, candidates: list[Draft]) -> None:
        self._candidates = candidates
        self._plan = self.planner.plan(candidates, self._context, self._row_ms, self._last_planned_rows)

    @property
    def _row_ms(self) -> float:
        """Cost of each row besides the target pass."""
        return self._topk_row_ms if self.wants_topk else 0.0

    def _asked_drafters(self) -> list[int]:
        """The model-based proposers among those that are asked in this step."""
        return [index for index in self.drafter_uses if index in self.selection.asked]

    def _charge_batch(self, steps: Sequence[Step], plain_ms: float, step_ms: float | None) -> None:
        """Add to the time that drafts may lose in a batch: a share of every step, and what its drafts saved or lost.

        step_ms  time of the step; None if it is unknown
        """
        self._learning_ms += LEARNING_SHARE * plain_ms
        if step_ms is not None and any(len(step.draft) for step in steps):
            emitted = sum(len(step.emitted) for step in steps)
            self._learning_ms += plain_ms * emitted / len(steps) - step_ms
        self._learning_ms = min(self._learning_ms, LEARNING_RESERVE * plain_ms)

    def _reread_ms(self, steps: Sequence[Step]) -> float:
        """Time in which rows of this pass are evaluated once more; no part of the time of the pass."""
        return reread_ms(steps, self.cost.at(self._context)) if self.planner.limits.rereads else 0.0

    def _plain_ms(self, sequences: int) -> float:
        """Time of a plain pass at the current context."""
        return self.cost.at(self._context)[min(sequences, self.cost.limit) - 1]

    def _use(self, source: ModelBased, first: int, experience: Experience) -> DrafterUse:
        """The use of a proposer whose first bucket has the index `first`."""
        known, clock = self.table.probability, self.fusion.clock  # a list that the table keeps up to date
        return DrafterUse(source, self.planner, lambda bucket: known[first + bucket], experience, clock)

    def _learn_drafter_uses(
        self, seqs: Sequence[int], steps: Sequence[Step], plain_ms: float, saved_ms: Mapping[int, Sequence[float]]
    ) -> None:
        """
        saved_ms  by the index of a model-based proposer: the time that its draft tokens saved, per sequence
        """
        token_ms = plain_ms / len(seqs)
        for index, use in self.drafter_uses.items():
            use.learn_pass(plain_ms)
            active = self._active[index] if index in saved_ms else ()
            spent_ms = self.selection.spent_ns[index] / 1e6 / len(active) if active else 0.0
            for place, (seq, step) in enumerate(zip(seqs, steps, strict=True)):
                tokens = len(step.emitted)
                saved = saved_ms[index][place] - spent_ms if place in active else None
                use.learn_step(seq, tokens, token_ms * tokens, saved)

    def _expected_ms(self, without: Sequence[int]) -> float:
        """Time that the plan is expected to save, had the proposers `without` not drafted."""
        buckets = frozenset[int]().union(*(self.fusion.own_buckets[index] for index in without))
        return self.planner.saved_ms(self._plan, self._context, buckets)

    def _measured_ms(self, index: int, steps: Sequence[Step]) -> list[float]:
        """Time that the draft tokens of one proposer saved in this pass for each sequence, negative where they lost.

        For an expensive proposer the expectation is not enough, as its mistakes are expensive, too.
        """
        owner = self.fusion.bucket_source
        ms, sequences = self.cost.at(self._context), len(steps)
        owners = [owner[step.draft.buckets].tolist() for step in steps]
        nodes = sum(map(len, owners))
        if not nodes:
            return [0.0] * sequences
        plain_ms, plan = ms[sequences - 1], self._plan
        change_ms = 0.0 if plan.rows == plan.last_rows else plan.change_ms
        limits = self.planner.limits
        rows = limits.rows([step.draft for step in steps])
        pass_ms = ms[min(rows, len(ms)) - 1] + change_ms
        pass_ms += self._reread_ms(steps)
        node_ms = (pass_ms - plain_ms) / nodes
        return [
            plain_ms / sequences * sum(line[node] == index for node in step.accepted) - node_ms * line.count(index)
            for line, step in zip(owners, steps, strict=True)
        ]


@cache  # after a pass of the target, creating one takes ten microseconds
def _plain_plan(sequences: int) -> Plan:
    """The plan in which nothing is drafted. It is shared, so nobody may change its list."""
    return Plan([EMPTY] * sequences, sequences, 0.0, 0.0)
