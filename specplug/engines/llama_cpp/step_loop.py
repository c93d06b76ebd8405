"""The step loop: plan, one target pass for all sequences, verify, keep the accepted branches, learn.

Runs one sequence or many: they start and end at any step, and prompts are read in pieces beside running sequences.
Depends neither on text nor on queues: `run`, `bench`, `tune`, `serve` and `SpeculativeLlama` drive the same loop.
KV cells are kept in order (cells.py), so that each sequence's text is that of its single run wherever passes of all
shapes round alike (q8_0 and q4_0 weights with a bf16 cache); `ExactPasses` shapes the passes for the other formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from specplug.core import NO_OPTIONS, Draft, IntArray, SequenceOptions, Step, TokenConstraint
from specplug.drafts.trees import first_branch
from specplug.engines.llama_cpp.cells import SPARE_SHARE
from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.draft_counts import DraftCounts
from specplug.engines.llama_cpp.emission import emit, emit_along
from specplug.engines.llama_cpp.exact_passes import ExactPasses
from specplug.engines.llama_cpp.prefill_budget import PrefillBudget
from specplug.engines.llama_cpp.prefill_order import shares
from specplug.engines.llama_cpp.prompt_scores import add_scores, scored_rows
from specplug.engines.llama_cpp.rollback import AnyTail, Rollback
from specplug.engines.llama_cpp.sampling import DrawsWithSampler, Sampler
from specplug.engines.llama_cpp.slots import Slots
from specplug.engines.llama_cpp.step_times import add_step, compare
from specplug.engines.llama_cpp.stream import Pass, Piece, Stream
from specplug.engines.llama_cpp.tree_batch import lay_out
from specplug.errors import SpecplugError, UsageError
from specplug.generation.counters import Counters
from specplug.generation.topk import top_ids
from specplug.planning.speculator import Speculator


class StepLoop:
    """Runs up to `slots` sequences on an empty context, which was opened for `rollback`."""

    def __init__(
        self,
        context: Context,
        speculator: Speculator,
        *,
        slots: int,
        rollback: Rollback | None = None,
        exact: ExactPasses | None = None,
        before_pass: Callable[[], None] | None = None,
        after_pass: Callable[[Pass], None] | None = None,
    ) -> None:
        """
        rollback     AnyTail, that of an attention cache, where None
        before_pass  called before each pass is planned; may change threads and cost curve
        after_pass   called when the tokens of a pass are emitted, while the context still holds its results
        """
        self.context = context
        self.speculator = speculator
        self.slots = slots
        self._rollback: Rollback = rollback or AnyTail()
        self.cells = self._rollback.cells(context, slots)
        self.prefill_budget = PrefillBudget()
        self.counters = Counters()
        """Sums over all finished sequences."""
        self.interrupted = False
        """Whether a pass has begun whose branches are not yet kept; stays True if the pass failed."""
        self._exact = exact
        self._before_pass = before_pass
        self._after_pass = after_pass
        self._pad_id = slots + 1
        self._leaf_ids = range(slots + 2, self._rollback.num_ids(slots, speculator.planner.max_nodes))
        self._roomy = context.cells - context.cells // SPARE_SHARE
        self._end_tokens = context.model.end_tokens
        self._slots = Slots(self.cells, slots, reuse=exact is None)
        self._draft_counts = DraftCounts(len(speculator.fusion.sources))

    @property
    def padded(self) -> bool:
        """Whether passes of one row get a second one."""
        return self._exact is not None and self._exact.padded

    @property
    def drafts(self) -> int:
        """Drafts that were verified, of one token or more."""
        return self._draft_counts.drafts

    @property
    def verified(self) -> npt.NDArray[np.int64]:
        """int64[proposers, depths]: verified draft tokens, by proposer and by depth in the draft."""
        return self._draft_counts.verified

    @property
    def accepted(self) -> npt.NDArray[np.int64]:
        """int64[proposers, depths]: accepted draft tokens, by proposer and by depth in the draft."""
        return self._draft_counts.accepted

    # -- life of a sequence ---------------------------------------------------------------------------------------

    def begin(
        self, prompt: IntArray, sampler: Sampler, max_tokens: int, max_draft: int, options: SequenceOptions = NO_OPTIONS
    ) -> Stream:
        """Give a prompt (int32[n], n >= 1) a slot, with the longest beginning of it that any slot has cached.

        The sequence owns the sampler from now on. Raises UsageError where no slot is free.
        """
        began = perf_counter_ns()
        seq, cached, places = self._slots.take(prompt, reuse=sampler.sampling.prompt_logprobs is None)
        stream = Stream(
            seq, prompt, sampler, max_tokens, max_draft, cached, began, position=cached, places=places, options=options
        )
        stream.counters.prompt_tokens = len(prompt)
        return stream

    def start(
        self, prompt: IntArray, sampler: Sampler, max_tokens: int, options: SequenceOptions = NO_OPTIONS
    ) -> Stream:
        """As `begin`, and read the prompt at once: the sequence has emitted its first token. Raises its failure."""
        try:
            stream = self.begin(prompt, sampler, max_tokens, max_tokens, options)
        except UsageError:
            sampler.close()
            raise
        try:
            while stream.reading:
                self.step([], [stream])
            if stream.failure:
                raise stream.failure
        except BaseException:
            self.finish(stream)
            raise
        return stream

    def adopt(self, prompt: IntArray, root: int, constraint: TokenConstraint | None = None) -> Stream:
        """A sequence in slot 0 whose `prompt` (int32[n]) is in the cache and followed by `root`; its caller samples,
        from the tokens that `constraint` allows after `root`."""
        stream = Stream(0, prompt, None, 0, self.context.num_batch, len(prompt), perf_counter_ns(), root, len(prompt))
        self._slots.free.remove(0)
        self._hand_to_proposers(stream, constraint)
        return stream

    def finish(self, stream: Stream) -> None:
        """Give the slot back, at any time between two steps; its tokens stay cached for a prompt that begins alike.

        After a pass that did not end, nothing in the cache can be relied on, and all of it is dropped.
        """
        if self.interrupted:
            self._forget()
        if stream.sampler is not None:
            stream.sampler.close()
        if not stream.reading:
            self.speculator.end(stream.seq)
        self._slots.free.append(stream.seq)
        self.counters.add(stream.counters)

    def reset(self) -> None:
        """Empty the cache; sequences under way are lost."""
        self._forget()
        self.interrupted = False

    def _forget(self) -> None:
        self.cells.reset()
        self._rollback.forget()

    def forget_prompts(self) -> None:
        """Drop the cached tokens of idle slots."""
        self._slots.forget()

    def preload(self, prompt: IntArray, state: bytes | None = None) -> bytes:
        """Fill an idle slot with a prompt (int32[n], n >= 1), so that a sequence needs to read only its last token.

        state  the result of this method on a loop of the same model and settings; if None, the prompt is read here
        """
        seq = self._slots.first_empty()
        if self._rollback.has_states:  # which could not be cut to evaluate the last token
            prompt = prompt[:-1]
        if state is not None:
            self.cells.make_room(len(prompt), [])
            self.cells.load(seq, prompt.tolist(), state)
            return state
        self.interrupted = True
        for at in range(0, len(prompt), self.context.num_batch):
            part = prompt[at : at + self.context.num_batch]
            self.cells.make_room(len(part), [])
            self.context.clear_batch()
            self.context.add_span(part, at, seq, wanted=False, last=True)
            self.context.decode()
            self.cells.append(seq, part.tolist(), range(len(part)))
            self.cells.end_pass(len(part))
        self.interrupted = False
        return self.context.state(seq)

    def shares_more_later(self, prompt: IntArray, reading: Sequence[Stream]) -> bool:
        """Whether a prompt should wait until one of those being read is cached, as both begin with the same tokens."""
        return self._slots.should_wait(prompt, [stream.prompt for stream in reading])

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self, running: Sequence[Stream], reading: Sequence[Stream] = ()) -> None:
        """One target pass: drafts of the `running` sequences, and pieces of the prompts of `reading` ones.

        Each sequence that runs afterwards has at least one token in `fresh`, or a `failure`. Raises SpecplugError where
        the pass itself fails; then every sequence is lost. `exact` takes several passes where one would round
        differently.
        """
        for together, prompts in self._passes(running, reading):
            others = len(running) - len(together)
            passed = self.evaluate(together, prompts, beside_prompts=bool(reading), others=others)
            for stream, tree in zip(together, passed.trees, strict=True):
                emit_along(stream, tree, self.context, passed.logits, self._end_tokens)
                if len(tree.draft):
                    stream.drafters = self._draft_counts.add(tree, self.speculator.fusion.bucket_source)
            self.settle(passed)

    def evaluate(
        self,
        running: Sequence[Stream],
        reading: Sequence[Stream] = (),
        *,
        beside_prompts: bool = False,
        others: int = 0,
    ) -> Pass:
        """Plan, and run the target. A caller that samples itself fills `fresh` and `accepted`, and calls `settle`.

        beside_prompts  whether prompts are read in this step, in this pass or in another one
        others          sequences that run in other passes of this step
        """
        if self._before_pass is not None:
            self._before_pass()
        began = perf_counter_ns()
        context = self.context
        if any(len(self.cells.tokens[s.seq]) != s.position for s in (*running, *reading)):
            raise SpecplugError("the KV cache was emptied after an interrupted pass; start the sequence again")
        drafts = self._plan(running, beside_prompts=beside_prompts)
        tree_rows = self._rollback.limits.rows(drafts)
        shares_of = self._prompt_rows(reading, len(running) + others, tree_rows) if reading else []
        padded = self.padded and tree_rows == 1 and not shares_of
        self.cells.make_room(tree_rows + sum(rows for _, rows in shares_of) + padded, self._slots.free)
        context.clear_batch()
        self.interrupted = True
        leaf_ids = iter(self._leaf_ids)
        least = tree_rows // len(running) if running and self._rollback.limits.even else 1
        trees = []
        for s, draft in zip(running, drafts, strict=True):
            branch = self._rollback.branch(context, s.seq, max(least, 1 + len(draft)))
            trees.append(lay_out(context, draft, s.root, s.position, branch, leaf_ids, least))
        pieces = [self._add(stream, rows) for stream, rows in shares_of]
        if padded:
            context.add(running[0].root, 0, (self._pad_id,))
        drafted = perf_counter_ns()
        context.decode()
        logits = context.logits(tree_rows + sum(piece.num_logits for piece in pieces) + padded)
        if padded:  # before anything else: no free cell may precede a taken one
            context.drop(self._pad_id)
        return Pass(running, trees, pieces, tree_rows, logits, began, drafted, perf_counter_ns(), others)

    def settle(self, passed: Pass) -> None:
        """Keep the accepted branches, let the proposers learn, start the sequences whose prompts are now read."""
        self._keep(passed)
        self.interrupted = self._rollback.is_incomplete
        verified = perf_counter_ns()
        if self._after_pass is not None:
            self._after_pass(passed)
        self._learn(passed)
        learned = perf_counter_ns()
        if passed.pieces:
            self._begin_decoding(passed)
        self._rollback.complete(self.context)
        self.interrupted = False
        ended = perf_counter_ns()
        if passed.running or passed.others:
            rows, step_ms = sum(len(piece.tokens) for piece in passed.pieces), (ended - passed.began_ns) / 1e6
            self.prefill_budget.observe(len(passed.running) + passed.others, passed.tree_rows, rows, step_ms)
        if passed.running:
            self._count(passed, verified, learned, ended)

    # -- parts of a step ------------------------------------------------------------------------------------------

    def _passes(
        self, running: Sequence[Stream], reading: Sequence[Stream]
    ) -> Iterator[tuple[Sequence[Stream], Sequence[Stream]]]:
        """The running and the reading sequences of each pass of this step."""
        if self._exact is None and not self._rollback.has_states:
            yield running, reading
            return
        if reading:
            yield (), reading[:1]
        together = self._exact.sequences if self._exact else max(1, len(running))
        for at in range(0, len(running), together):
            yield running[at : at + together], ()

    def _plan(self, running: Sequence[Stream], *, beside_prompts: bool) -> list[Draft]:
        if not running:
            return []
        fill = sum(s.position for s in running)
        # A draft of n nodes can emit n + 1 tokens: never draft past the limit.
        budgets = [min(s.left - 1, s.max_draft) for s in running]
        left = [s.left for s in running]
        seqs, context = [s.seq for s in running], fill // len(running)
        drafts = self.speculator.plan(seqs, context, budgets, left, beside_prompts=beside_prompts)
        limits = self._rollback.limits
        if limits.trees and fill + limits.rows(drafts) > self._roomy:  # few cells are left: chains retain none
            return [draft.select(first_branch(draft.parents.tolist())) for draft in drafts]
        return drafts

    def _prompt_rows(self, reading: Sequence[Stream], sequences: int, tree_rows: int) -> list[tuple[Stream, int]]:
        """The prompts that get rows in this pass, and how many."""
        room = self._exact.prompt_rows if self._exact else self.context.num_batch - tree_rows
        if sequences and not self._exact:
            room = min(room, self.prefill_budget.rows(sequences, tree_rows))
        unread = [(stream.places or [len(stream.prompt)])[0] - stream.position for stream in reading]
        return scored_rows(reading, shares(unread, room), self.context.max_rows - tree_rows)

    def _add(self, stream: Stream, rows: int) -> Piece:
        first, at = self.context.rows, stream.position
        tokens = stream.prompt[at : at + rows]
        last = at + rows == len(stream.prompt)
        self.context.add_span(tokens, at, stream.seq, wanted=stream.top_of_prompt is not None, last=last)
        return Piece(stream, tokens, first, last)

    def _keep(self, passed: Pass) -> None:
        """Keep roots, accepted nodes and prompts in the cache; all cells before the last one kept stay taken."""
        rows = self.context.rows if passed.pieces else 0
        for tree in passed.trees:
            rows = max(rows, tree.first + 1)
            if tree.accepted:
                rows = max(rows, *(tree.row_of[node] + 1 for node in tree.accepted))
        for stream, tree in zip(passed.running, passed.trees, strict=True):
            stream.position = self._rollback.keep(self.cells, tree, stream.seq, stream.root, stream.position, rows)
            if stream.fresh:
                stream.root = stream.fresh[-1]
        for piece in passed.pieces:
            taken = range(piece.first, piece.first + len(piece.tokens))
            self.cells.append(piece.stream.seq, piece.tokens.tolist(), taken)
            piece.stream.position += len(piece.tokens)
            if piece.stream.places[:1] == [piece.stream.position]:
                self.cells.make_checkpoint(piece.stream.seq)
                del piece.stream.places[0]
        self.cells.end_pass(rows)

    def _learn(self, passed: Pass) -> None:
        running, speculator = passed.running, self.speculator
        if not running:
            speculator.note_other_pass()
            return
        began = perf_counter_ns()
        topk = top_ids(passed.logits[: passed.tree_rows], speculator.wants_topk) if speculator.wants_topk else None
        topk_ns = perf_counter_ns() - began
        # A sequence that failed may have emitted nothing; it is about to be forgotten, so any token will do.
        steps = [
            Step(s.fresh or [0], tree.draft, tree.accepted, None if topk is None else topk[tree.rows])
            for s, tree in zip(running, passed.trees, strict=True)
        ]
        target_ms = None if passed.pieces else passed.target_ms
        speculator.observe([s.seq for s in running], steps, target_ms=target_ms, topk_ns=topk_ns)

    def _begin_decoding(self, passed: Pass) -> None:
        """Emit the first token of sequences whose prompts are read; they run from now on."""
        row = passed.tree_rows - 1
        for piece in passed.pieces:
            add_scores(piece, passed.logits[row + 1 : row + 1 + piece.num_logits])
            row += piece.num_logits
            if not piece.last:
                continue
            stream = piece.stream
            stream.fresh, stream.logprobs = [], []
            try:
                stream.root = emit(stream, self.context, passed.logits, row, self._end_tokens)
            except SpecplugError as error:
                stream.failure = error
            stream.counters.prompt_ns = perf_counter_ns() - stream.began_ns
            self._hand_to_proposers(stream, stream.sampler.token_constraint() if stream.sampler else None)

    def _hand_to_proposers(self, stream: Stream, constraint: TokenConstraint | None) -> None:
        """Pass the prompt and its first token to the proposers; the sequence no longer reads."""
        began, prompt = perf_counter_ns(), np.append(stream.prompt, np.int32(stream.root))
        self.speculator.begin(stream.seq, prompt, stream.options, constraint)
        if stream.sampler is not None:
            for proposer in self.speculator.fusion.sources:
                if isinstance(proposer, DrawsWithSampler):
                    proposer.use_sampler(stream.seq, stream.sampler)
        stream.reading = False
        stream.counters.draft_ns += perf_counter_ns() - began

    # -- counting -------------------------------------------------------------------------------------------------

    def _count(self, passed: Pass, verified: int, learned: int, ended: int) -> None:
        """Add a step's times and tokens to each sequence's counters, and compare it with plain decoding.

        Steps with pieces of prompts are not compared, and others only while plain passes have run recently.
        """
        n, step_ms = len(passed.running), (ended - passed.began_ns) / 1e6
        add_step(passed, verified, learned)
        cost = self.speculator.cost
        if not passed.pieces and cost.shows_plain(n):
            plain_ms = cost.at(sum(s.position for s in passed.running) // n)[min(n, cost.limit) - 1]
            compare(passed, step_ms, plain_ms)
