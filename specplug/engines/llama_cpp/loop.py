"""The step loop: draft, plan, one target pass for all running sequences, verify, keep the accepted branch.

Knows sequence ids, trees in a batch and whose KV cells survive. Knows neither text nor files.

Cells: a draft's likeliest branch stays on the sequence's home id and goes into the batch first, so that accepting it
moves nothing. Cells of rejected nodes that lie before an accepted one stay taken (parked: they belong to an id that
never attends), so that a later token never lands before an earlier one and attention sums in plain decoding's order.
Parked cells are few and bounded; where they run out, drafts are cut to their first branch, which parks nothing.
Where one-row passes run other kernels, `exact` needs them padded to two rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns

import numpy as np

from specplug.core import ROOT, Draft, IntArray, Step
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.sampling import DrawsAlike, Sampler
from specplug.engines.llama_cpp.tree_batch import Tree, first_branch, lay_out
from specplug.errors import UsageError
from specplug.generation.answers import Sampling, TokenLogprobs
from specplug.generation.counters import Counters
from specplug.generation.topk import top_ids
from specplug.planning.speculator import Speculator

SPARE_SHARE = 8
"""One KV cell in so many of the context may be held back for rejected nodes."""


@dataclass(slots=True)
class Running:
    """One sequence under way.

    root      the last emitted token: known, not yet in the KV cache
    position  tokens of it in the KV cache
    sampler   picks its tokens; None where the caller walks its trees itself
    fresh     what the last step emitted; all but the last were accepted guesses
    finish    None while running; then "stop" (end token) or "length"
    """

    seq: int
    sampler: Sampler | None
    end_tokens: frozenset[int]
    root: int
    position: int
    left: int
    counters: Counters = field(default_factory=Counters)
    fresh: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """One target pass: the trees of `running`, the logits of all rows, and when its parts ended (nanoseconds)."""

    running: Sequence[Running]
    trees: list[Tree]
    logits: Logits
    began_ns: int
    drafted_ns: int
    decoded_ns: int


class StepLoop:
    """Runs up to `slots` sequences on one context; ids 0..slots-1 are their homes, the rest serve tree leaves."""

    def __init__(
        self,
        context: Context,
        speculator: Speculator,
        *,
        slots: int,
        spare_cells: int,
        exact: bool = False,
        padded: bool = False,
        coupled: bool = False,
    ) -> None:
        """For a context with `ids_needed` sequence ids; `spare_cells` may be parked per slot.

        exact   reads every prompt from its beginning, in the same passes
        padded  gives passes of one row a second one; slots must be 1
        coupled draws tokens by GumbelNoise
        """
        assert not padded or slots == 1
        self.context = context
        self.speculator = speculator
        self.counters = Counters()
        self._exact = exact
        self._padded = padded
        self._coupled = coupled
        self._free_homes = list(range(slots))
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._parked: list[list[int]] = [[] for _ in range(slots)]  # positions
        self._spare_cells = spare_cells
        self.interrupted = False
        """A pass has begun, and its branches are not yet kept: so it stays where the pass failed."""
        self._first_park_id, self._pad_id = slots, 2 * slots
        self._leaf_ids = range(2 * slots + 1, ids_needed(slots, speculator.planner.max_nodes))

    # -- life of a sequence ---------------------------------------------------------------------------------------

    def start(self, prompt: IntArray, sampling: Sampling, max_tokens: int) -> Running:
        """Read the prompt (int32[n], n >= 1), emit the first token, and register with the proposers.

        Raises UsageError when the prompt is empty or does not fit, or when all slots are taken.
        """
        if not len(prompt):
            raise UsageError("the prompt is empty; give at least one token")
        if not self._free_homes:
            raise UsageError("every slot is taken; finish a sequence first")
        began = perf_counter_ns()
        seq = self._choose_home(prompt)
        sampler = Sampler(self.context.model, sampling, coupled=self._coupled)
        try:
            logits = self._read_prompt(seq, prompt)
        except BaseException:
            sampler.close()
            self.forget(seq)
            raise
        running = Running(seq, sampler, self.context.model.end_tokens, 0, len(prompt), max_tokens)
        running.root = emit(self.context, running, logits, len(logits) - 1)
        running.counters.prompt_tokens = len(prompt)
        running.counters.prompt_ns = perf_counter_ns() - began
        self.adopt(running, prompt)
        draw_alike(self.speculator, running)
        return running

    def adopt(self, running: Running, prompt: IntArray) -> None:
        """Take over a sequence whose prompt (int32[n]) is in the cache on its home id, and whose root is known."""
        began = perf_counter_ns()
        self._free_homes.remove(running.seq)
        self._held[running.seq] = prompt.tolist()
        self.speculator.begin(running.seq, np.append(prompt, np.int32(running.root)))
        running.counters.draft_ns += perf_counter_ns() - began

    def release(self, running: Running) -> None:
        """Forget a sequence, but not its KV cells, unless its last pass was interrupted: then nothing of it is sure."""
        if self.interrupted:
            self.forget(running.seq)
            for leaf in (*self._leaf_ids, self._pad_id):
                self.context.drop(leaf)
        self.speculator.end(running.seq)
        self._free_homes.append(running.seq)
        self.counters.add(running.counters)

    def finish(self, running: Running) -> None:
        """Give the slot back; its KV cells stay for a prompt with the same beginning."""
        assert running.sampler is not None
        running.sampler.close()
        self.release(running)

    def forget_prompts(self) -> None:
        """Drop what idle slots keep for prompts with the same beginning."""
        for seq in self._free_homes:
            self.forget(seq)

    def preload(self, prompt: IntArray, state: bytes | None = None) -> bytes:
        """Let an idle slot hold a prompt (int32[n], n >= 1), so that `start` reads its last token only.

        state  what this returned on a loop of the same model and settings; read here where None
        """
        seq = next(seq for seq in self._free_homes if not self._held[seq])
        if state is None:
            self._read_prompt(seq, prompt)
            state = self.context.state(seq)
        else:
            self.context.restore(seq, state)
        self._held[seq] = prompt.tolist()
        return state

    def forget(self, seq: int, start: int = 0) -> None:
        """Free a slot's cells from position `start` on, parked ones included."""
        self.context.drop(seq, start)
        self.context.drop(self._first_park_id + seq, start)
        del self._held[seq][start:]
        self._parked[seq] = [position for position in self._parked[seq] if position < start]

    def room(self, seq: int, cells: int) -> int:
        """How many of `cells` are not parked; all, where parked ones would leave none: later tokens then fill holes."""
        if cells <= len(self._parked[seq]):
            self.free_parked(seq)
        return cells - len(self._parked[seq])

    def free_parked(self, seq: int) -> None:
        self.context.drop(self._first_park_id + seq)
        self._parked[seq] = []

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self, running: Sequence[Running]) -> None:
        """One target pass for `running` (none of them finished); each gets at least one token in `fresh`."""
        passed = self.evaluate(running)
        for r, tree in zip(running, passed.trees, strict=True):
            walk(self.context, r, tree, passed.logits)
        self.settle(passed)

    def evaluate(self, running: Sequence[Running]) -> Pass:
        """Draft and run the target. The caller walks the trees: fills each `fresh` and `accepted`, then settles."""
        began = perf_counter_ns()
        context = self.context
        fill = sum(r.position for r in running) // len(running)
        # A draft of n nodes can emit n + 1 tokens: never draft past the limit.
        drafts = self.speculator.plan([r.seq for r in running], fill, [r.left - 1 for r in running])
        context.clear_batch()
        self.interrupted = True
        leaf_ids = iter(self._leaf_ids)
        trees = [
            lay_out(context, self._spare(r, draft), r.root, r.position, r.seq, leaf_ids)
            for r, draft in zip(running, drafts, strict=True)
        ]
        padded = self._padded and context.rows < 2
        if padded:
            context.add(running[0].root, 0, (self._pad_id,))
        drafted = perf_counter_ns()
        context.decode()
        logits = context.logits(context.rows)
        if padded:  # at once: a later token must find no hole before the sequence's own cells
            context.drop(self._pad_id)
        return Pass(running, trees, logits, began, drafted, perf_counter_ns())

    def settle(self, passed: Pass) -> None:
        """Keep the accepted branches in the cache, and let the proposers learn from what came."""
        running, trees, speculator = passed.running, passed.trees, self.speculator
        for r, tree in zip(running, trees, strict=True):
            self._keep_branch(r, tree)
        self.interrupted = False
        verified = perf_counter_ns()
        topk = top_ids(passed.logits, speculator.wants_topk) if speculator.wants_topk else None
        ranked = perf_counter_ns()
        steps = [
            Step(r.fresh, tree.draft, tree.accepted, rows_of(topk, tree))
            for r, tree in zip(running, trees, strict=True)
        ]
        speculator.observe(
            [r.seq for r in running],
            steps,
            target_ms=(passed.decoded_ns - passed.drafted_ns) / 1e6,
            topk_ns=ranked - verified,
        )
        ended = perf_counter_ns()
        for r, tree in zip(running, trees, strict=True):
            c = r.counters
            c.steps += 1
            c.emitted_tokens += len(r.fresh)
            c.draft_tokens += len(tree.draft)
            c.accepted_tokens += len(tree.accepted)
            c.target_ns += (passed.decoded_ns - passed.drafted_ns) // len(running)
            c.sample_ns += (verified - passed.decoded_ns) // len(running)
            c.draft_ns += (passed.drafted_ns - passed.began_ns + ended - verified) // len(running)

    # -- parts of a step ------------------------------------------------------------------------------------------

    def _spare(self, r: Running, draft: Draft) -> Draft:
        """The draft, or its first branch where it might need more parked cells than are left."""
        if len(draft) + len(self._parked[r.seq]) <= self._spare_cells:
            return draft
        return draft.select(first_branch(draft))

    def _keep_branch(self, r: Running, tree: Tree) -> None:
        """The KV cache keeps the root and the accepted nodes on the home id; everything else goes."""
        context, draft, accepted = self.context, tree.draft, tree.accepted
        start = r.position + 1  # the root's own cell is now part of the sequence
        stop = start + len(accepted)
        held = self._held[r.seq]
        held.append(r.root)
        winner = r.seq
        if accepted:
            held.extend(draft.tokens[accepted].tolist())
            winner = tree.leaf_of[accepted[-1]]
            if tree.extra:
                self._park(r, tree)
        if winner != r.seq:
            shared = start + sum(tree.leaf_of[node] == r.seq for node in accepted)
            context.drop(r.seq, shared)
            context.copy(winner, r.seq, shared, stop)
        elif len(draft) > len(accepted):
            context.drop(r.seq, stop)
        for leaf in tree.extra:
            context.drop(leaf)
        r.position = stop
        r.root = r.fresh[-1]

    def _park(self, r: Running, tree: Tree) -> None:
        """Keep rejected cells that lie before the last accepted one taken, on an id that nobody attends to."""
        last_row = tree.row_of[tree.accepted[-1]]
        if last_row - tree.first == len(tree.accepted):
            return
        parked = self._parked[r.seq]
        for node, depth in enumerate(tree.draft.depths().tolist()):
            if tree.row_of[node] < last_row and node not in tree.accepted:
                position = r.position + depth
                self.context.copy(tree.leaf_of[node], self._first_park_id + r.seq, position, position + 1)
                parked.append(position)

    # -- prompts --------------------------------------------------------------------------------------------------

    def _choose_home(self, prompt: IntArray) -> int:
        """The free slot whose cells share the longest beginning with `prompt`."""
        return max(self._free_homes, key=lambda seq: common_prefix(self._held[seq], prompt))

    def _read_prompt(self, seq: int, prompt: IntArray) -> Logits:
        """Evaluate what is not yet in the cache; returns float32[1, V], the logits after the last token."""
        context = self.context
        # The last token is always evaluated anew: its logits are needed.
        start = 0 if self._exact else min(common_prefix(self._held[seq], prompt), len(prompt) - 1)
        self.forget(seq, start)
        step = context.num_batch
        for at in range(start, len(prompt), step):
            context.clear_batch()
            part = prompt[at : at + step]
            final = at + step >= len(prompt)
            context.add_span(part, at, seq, wanted=False, last=final)
            context.decode()
        return context.logits(1)


def draw_alike(speculator: Speculator, r: Running) -> None:
    """Let proposers that can draw their guesses as the sequence's own tokens are drawn."""
    assert r.sampler is not None
    for source in speculator.fusion.sources:
        if isinstance(source, DrawsAlike):
            source.draw_like(r.seq, r.sampler)


def walk(context: Context, r: Running, tree: Tree, logits: Logits) -> None:
    """Walk the tree along the target's own tokens; fills r.fresh, r.logprobs and tree.accepted."""
    r.logprobs = []
    r.fresh = []
    token = emit(context, r, logits, tree.first)
    child = tree.children()
    node = child.get((ROOT, token))
    while node is not None and r.finish is None:
        tree.accepted.append(node)
        token = emit(context, r, logits, tree.row_of[node])
        node = child.get((node, token))


def emit(context: Context, r: Running, logits: Logits, row: int) -> int:
    """The target's own token after `row`, added to r.fresh; sets r.finish where it is the last one."""
    assert r.sampler is not None
    token = r.sampler.pick(context, logits, row)
    if r.sampler.sampling.logprobs is not None:
        report = r.sampler.logprobs(logits, row, token)
        if report is not None:
            r.logprobs.append(report)
    r.fresh.append(token)
    r.left -= 1
    if token in r.end_tokens:
        r.finish = "stop"
    elif r.left <= 0:
        r.finish = "length"
    return token


def rows_of(topk: IntArray | None, tree: Tree) -> IntArray | None:
    """The top ids of the root's row and of every node's."""
    if topk is None:
        return None
    return topk[[tree.first, *tree.row_of]] if tree.row_of else topk[tree.first : tree.first + 1]


def ids_needed(slots: int, max_nodes: int) -> int:
    """Sequence ids for `slots` homes and their parked cells, `exact`'s pad, and as many leaves as a plan can have."""
    return 2 * slots + 1 + max_nodes


def common_prefix(held: list[int] | IntArray, prompt: IntArray) -> int:
    """How many leading tokens both share."""
    n = min(len(held), len(prompt))
    differs = np.asarray(held[:n], dtype=np.int32) != prompt[:n]
    return int(differs.argmax()) if differs.any() else n
