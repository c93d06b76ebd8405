"""The step loop: draft, plan, one target pass for all running sequences, verify, keep the accepted branch.

Knows sequence ids, trees in a batch and whose KV cells survive. Knows neither text nor files.
Source: one llama.cpp sequence id per leaf, a node carries the ids of all leaves below it, so that shared prefixes are
evaluated once and attention sees exactly the ancestors.

Cells: a draft's likeliest branch stays on the sequence's home id and goes into the batch first, so that accepting it
moves nothing. Cells of rejected nodes that lie before an accepted one stay taken (parked: they belong to an id that
never attends), so that a later token never lands before an earlier one and attention sums in plain decoding's order.
Parked cells are few and bounded; where they run out, drafts are cut to their first branch, which parks nothing.
Where one-row passes run other kernels, `exact` needs them padded to two rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns

import numpy as np

from specplug.core import ROOT, Draft, IntArray, Step
from specplug.counters import Counters
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.sampling import Sampler, Sampling, TokenLogprobs
from specplug.errors import UsageError
from specplug.speculator import Speculator
from specplug.topk import top_ids


@dataclass(slots=True)
class Running:
    """One sequence under way.

    root      the last emitted token: known, not yet in the KV cache
    position  tokens of it in the KV cache
    fresh     what the last step emitted; all but the last were accepted guesses
    finish    None while running; then "stop" (end token), "length" or "context"
    """

    seq: int
    sampler: Sampler
    end_tokens: frozenset[int]
    root: int
    position: int
    left: int
    counters: Counters = field(default_factory=Counters)
    fresh: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a draft's nodes stand in the batch.

    row_of  batch row of each node; the root's row is `first`
    leaf_of sequence id that carries each node's branch to a leaf
    extra   the sequence ids used beside the home id
    """

    first: int
    row_of: list[int]
    leaf_of: list[int]
    extra: list[int]


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
    ) -> None:
        """For a context with `ids_needed` sequence ids; `spare_cells` may be parked per slot.

        exact   reads every prompt from its beginning, in the same passes
        padded  gives passes of one row a second one; slots must be 1
        """
        assert not padded or slots == 1
        self.context = context
        self.speculator = speculator
        self.counters = Counters()
        self._exact = exact
        self._padded = padded
        self._free_homes = list(range(slots))
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._parked: list[list[int]] = [[] for _ in range(slots)]  # positions
        self._spare_cells = spare_cells
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
        sampler = Sampler(self.context.model, sampling)
        try:
            logits = self._read_prompt(seq, prompt)
        except BaseException:
            sampler.close()
            self._forget(seq)
            raise
        running = Running(seq, sampler, self.context.model.end_tokens, 0, len(prompt), max_tokens)
        self._free_homes.remove(seq)
        token = self._emit(running, logits, len(logits) - 1)
        running.fresh = [token]
        running.root = token
        self._held[seq] = prompt.tolist()
        read = perf_counter_ns()
        self.speculator.begin(seq, np.append(prompt, np.int32(token)))
        running.counters.prompt_tokens = len(prompt)
        running.counters.prompt_ns = read - began
        running.counters.draft_ns = perf_counter_ns() - read
        return running

    def finish(self, running: Running) -> None:
        """Give the slot back; its KV cells stay for a prompt with the same beginning."""
        running.sampler.close()
        self.speculator.end(running.seq)
        self._free_homes.append(running.seq)
        self.counters.add(running.counters)

    def forget_prompts(self) -> None:
        """Drop what idle slots keep for prompts with the same beginning."""
        for seq in self._free_homes:
            self._forget(seq)

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self, running: Sequence[Running]) -> None:
        """One target pass for `running` (none of them finished); each gets at least one token in `fresh`."""
        began = perf_counter_ns()
        speculator, context = self.speculator, self.context
        seqs = [r.seq for r in running]
        fill = sum(r.position for r in running) // len(running)
        # A draft of n nodes can emit n + 1 tokens: never draft past the limit.
        drafts = speculator.plan(seqs, fill, [r.left - 1 for r in running])
        drafts = [self._spare(r, draft) for r, draft in zip(running, drafts, strict=True)]
        context.clear_batch()
        leaf_ids = iter(self._leaf_ids)
        layouts = [self._lay_out(r, draft, leaf_ids) for r, draft in zip(running, drafts, strict=True)]
        padded = self._padded and context.rows < 2
        if padded:
            context.add(running[0].root, 0, (self._pad_id,))
        drafted = perf_counter_ns()
        context.decode()
        logits = context.logits(context.rows)
        if padded:  # at once: a later token must find no hole before the sequence's own cells
            context.drop(self._pad_id)
        decoded = perf_counter_ns()
        paths = [self._verify(r, d, at, logits) for r, d, at in zip(running, drafts, layouts, strict=True)]
        for r, draft, at, accepted in zip(running, drafts, layouts, paths, strict=True):
            self._keep_branch(r, draft, at, accepted)
        verified = perf_counter_ns()
        topk = top_ids(logits, speculator.wants_topk) if speculator.wants_topk else None
        ranked = perf_counter_ns()
        steps = [
            Step(r.fresh, draft, accepted, _rows_of(topk, at))
            for r, draft, at, accepted in zip(running, drafts, layouts, paths, strict=True)
        ]
        speculator.observe(seqs, steps, target_ms=(decoded - drafted) / 1e6, topk_ns=ranked - verified)
        ended = perf_counter_ns()
        for r, draft, accepted in zip(running, drafts, paths, strict=True):
            c = r.counters
            c.steps += 1
            c.emitted_tokens += len(r.fresh)
            c.draft_tokens += len(draft)
            c.accepted_tokens += len(accepted)
            c.target_ns += (decoded - drafted) // len(running)
            c.sample_ns += (verified - decoded) // len(running)
            c.draft_ns += (drafted - began + ended - verified) // len(running)

    # -- parts of a step ------------------------------------------------------------------------------------------

    def _spare(self, r: Running, draft: Draft) -> Draft:
        """The draft, or its first branch where it might need more parked cells than are left."""
        if len(draft) + len(self._parked[r.seq]) <= self._spare_cells:
            return draft
        parents = draft.parents.tolist()
        branch: list[int] = []
        for node, parent in enumerate(parents):
            if parent == (branch[-1] if branch else ROOT):
                branch.append(node)
        return draft if len(branch) == len(draft) else draft.select(branch)

    def _lay_out(self, r: Running, draft: Draft, leaf_ids: Iterator[int]) -> _Layout:
        """Add the root's and the draft's rows to the batch; the likeliest branch first and on the home id."""
        context, first = self.context, self.context.rows
        n = len(draft)
        if not n:
            context.add(r.root, r.position, (r.seq,))
            return _Layout(first, _NO_NODES, _NO_NODES, _NO_NODES)
        parents = draft.parents.tolist()
        if parents == list(range(-1, n - 1)):
            context.add_span([r.root, *draft.tokens.tolist()], r.position, r.seq, wanted=True)
            return _Layout(first, list(range(first + 1, first + 1 + n)), [r.seq] * n, [])
        order, ids, leaf_of, extra = _branches(parents, r.seq, leaf_ids)
        for leaf in extra:
            context.copy(r.seq, leaf)
        context.add(r.root, r.position, [r.seq, *extra])
        tokens, depths = draft.tokens.tolist(), draft.depths().tolist()
        row_of = [0] * n
        for node in order:
            row_of[node] = context.rows
            context.add(tokens[node], r.position + depths[node], ids[node])
        return _Layout(first, row_of, leaf_of, extra)

    def _verify(self, r: Running, draft: Draft, at: _Layout, logits: Logits) -> list[int]:
        """Walk the tree along the target's own tokens; fills r.fresh and returns the accepted nodes."""
        r.fresh = []
        r.logprobs = []
        token = self._emit(r, logits, at.first)
        r.fresh.append(token)
        accepted: list[int] = []
        if not len(draft):
            return accepted
        child = {
            (parent, t): node
            for node, (parent, t) in enumerate(zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True))
        }
        node = child.get((ROOT, token))
        while node is not None and r.finish is None:
            accepted.append(node)
            token = self._emit(r, logits, at.row_of[node])
            r.fresh.append(token)
            node = child.get((node, token))
        return accepted

    def _emit(self, r: Running, logits: Logits, row: int) -> int:
        token = r.sampler.pick(self.context, logits, row)
        if r.sampler.sampling.logprobs is not None:
            report = r.sampler.logprobs(logits, row, token)
            if report is not None:
                r.logprobs.append(report)
        r.left -= 1
        if token in r.end_tokens:
            r.finish = "stop"
        elif r.left <= 0:
            r.finish = "length"
        return token

    def _keep_branch(self, r: Running, draft: Draft, at: _Layout, accepted: list[int]) -> None:
        """The KV cache keeps the root and the accepted nodes on the home id; everything else goes."""
        context = self.context
        start = r.position + 1  # the root's own cell is now part of the sequence
        stop = start + len(accepted)
        held = self._held[r.seq]
        held.append(r.root)
        held.extend(draft.tokens[accepted].tolist())
        winner = at.leaf_of[accepted[-1]] if accepted else r.seq
        if at.extra and accepted:
            self._park(r, draft, at, accepted)
        if winner != r.seq:
            shared = start + sum(at.leaf_of[node] == r.seq for node in accepted)
            context.drop(r.seq, shared)
            context.copy(winner, r.seq, shared, stop)
        elif len(draft) > len(accepted):
            context.drop(r.seq, stop)
        for leaf in at.extra:
            context.drop(leaf)
        r.position = stop
        r.root = r.fresh[-1]

    def _park(self, r: Running, draft: Draft, at: _Layout, accepted: list[int]) -> None:
        """Keep rejected cells that lie before the last accepted one taken, on an id that nobody attends to."""
        last_row = at.row_of[accepted[-1]]
        if last_row - at.first == len(accepted):
            return
        parked = self._parked[r.seq]
        for node, depth in enumerate(draft.depths().tolist()):
            if at.row_of[node] < last_row and node not in accepted:
                position = r.position + depth
                self.context.copy(at.leaf_of[node], self._first_park_id + r.seq, position, position + 1)
                parked.append(position)

    # -- prompts --------------------------------------------------------------------------------------------------

    def _choose_home(self, prompt: IntArray) -> int:
        """The free slot whose cells share the longest beginning with `prompt`."""
        return max(self._free_homes, key=lambda seq: _common_prefix(self._held[seq], prompt))

    def _read_prompt(self, seq: int, prompt: IntArray) -> Logits:
        """Evaluate what is not yet in the cache; returns float32[1, V], the logits after the last token."""
        context = self.context
        # The last token is always evaluated anew: its logits are needed.
        start = 0 if self._exact else min(_common_prefix(self._held[seq], prompt), len(prompt) - 1)
        self._forget(seq, start)
        step = context.num_batch
        for at in range(start, len(prompt), step):
            context.clear_batch()
            part = prompt[at : at + step]
            final = at + step >= len(prompt)
            context.add_span(part, at, seq, wanted=False, last=final)
            context.decode()
        return context.logits(1)

    def _forget(self, seq: int, start: int = 0) -> None:
        """Free a slot's cells from position `start` on, parked ones included."""
        self.context.drop(seq, start)
        self.context.drop(self._first_park_id + seq, start)
        del self._held[seq][start:]
        self._parked[seq] = [position for position in self._parked[seq] if position < start]


_NO_NODES: list[int] = []


def _rows_of(topk: IntArray | None, at: _Layout) -> IntArray | None:
    """The top ids of the root's row and of every node's."""
    if topk is None:
        return None
    return topk[[at.first, *at.row_of]] if at.row_of else topk[at.first : at.first + 1]


def ids_needed(slots: int, max_nodes: int) -> int:
    """Sequence ids for `slots` homes and their parked cells, `exact`'s pad, and as many leaves as a plan can have."""
    return 2 * slots + 1 + max_nodes


def _branches(
    parents: list[int], home: int, leaf_ids: Iterator[int]
) -> tuple[list[int], list[list[int]], list[int], list[int]]:
    """Nodes depth first, the ids of the leaves below each, one of these ids per node, and the ids used beside home.

    The first branch in this order keeps the home id.
    """
    n = len(parents)
    children: list[list[int]] = [[] for _ in range(n + 1)]  # the last list, index ROOT, is the root's
    for node, parent in enumerate(parents):
        children[parent].append(node)
    order: list[int] = []
    ids: list[list[int]] = [[] for _ in range(n + 1)]
    extra: list[int] = []
    leaf = home
    stack = children[ROOT][::-1]
    while stack:
        node = stack.pop()
        order.append(node)
        if children[node]:
            stack.extend(reversed(children[node]))
        else:
            ids[node] = [leaf]
            if stack:
                leaf = next(leaf_ids)
                extra.append(leaf)
    for node in reversed(order):
        ids[parents[node]] = ids[node] + ids[parents[node]]
    return order, ids, [line[0] for line in ids[:n]], extra


def _common_prefix(held: list[int], prompt: IntArray) -> int:
    """How many leading tokens both share."""
    n = min(len(held), len(prompt))
    differs = np.asarray(held[:n], dtype=np.int32) != prompt[:n]
    return int(differs.argmax()) if differs.any() else n
