"""Drafts with a head that continues the target's own hidden states, for any number of sequences in one pass.

Knows the head's context and what the target hands to it after its passes. Depends neither on the planner nor on where
the states come from, which is the kind of head (mtp_drafter.py, eagle_drafter.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence, Set
from math import inf
from time import perf_counter_ns
from typing import NotRequired, TypedDict

import numpy as np

from specplug.core import Draft, IntArray, int_array
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.drafters.chain import Chain
from specplug.engines.llama_cpp.drafters.chain_drafter import SCORE_CONTEXT, SCORED_ROWS, ChainDrafter, ms_since
from specplug.engines.llama_cpp.drafters.drafter_times import DrafterTimes
from specplug.engines.llama_cpp.drafters.head_context import HeadContext
from specplug.engines.llama_cpp.drafters.head_text import HeadText, Layout
from specplug.engines.llama_cpp.drafters.pass_timing import PassTiming
from specplug.engines.llama_cpp.drafters.state_history import States
from specplug.engines.llama_cpp.stream import Pass, Piece
from specplug.planning.constants import READING_PIECE

READ_WITH_ROOT = READING_PIECE
"""Most entries of a text that are read in the pass that drafts its next token; others are read before, without logits,
since an EAGLE-3 head computes them for all rows of a pass or for none."""


EvaluatedPart = tuple[int, Sequence[int], States, int]
"""A sequence, tokens and states of consecutive entries, and the first of these entries."""


class HeadLimits(TypedDict):
    """The keyword arguments of every `HeadDrafter`."""

    slots: int
    max_tokens: int
    max_draft: int
    branches: int
    end_tokens: NotRequired[Set[int]]


class HeadDrafter(ChainDrafter):
    """Base of drafters that read the target's hidden states.

    After every pass of the target, `follow` takes the states of the rows that were kept. They wait until the drafter is
    asked: then it reads them, in front of the last token, and goes on with the states that it gives itself.
    State: the states of all tokens in the target's cache (2 bytes per number), so that a text which continues another
    one is read from its first new token on; per slot the KV cells of one layer.
    Requires: nothing of the target's proposers; hidden states that only this engine hands over.
    Cost per draft token: a pass of one layer and an output matrix over one row for each sequence; each kept token costs
    one more row.
    """

    def __init__(
        self,
        context: HeadContext,
        target: Context,
        layout: Layout,
        ids: IntArray | None = None,
        *,
        slots: int,
        max_tokens: int,
        max_draft: int,
        branches: int,
        end_tokens: Set[int] = frozenset(),
    ) -> None:
        """
        context     with the sequence ids 0..slots, of which the last one is used for scoring and encoding
        target      whose passes record the states
        ids         int32[rows]: the tokens of the rows of logits; None where row i belongs to token i
        max_tokens  longest text of one sequence
        end_tokens  tokens after which nothing is drafted
        """
        super().__init__(
            ids,
            DrafterTimes(slots, 0),
            max_tokens=max_tokens,
            max_draft=max_draft,
            branches=branches,
            end_tokens=end_tokens,
        )
        self._context = context
        self._target = target
        self._layout = layout
        self._spare_id = slots
        self._timing = PassTiming(context, slots, self._spare_id)
        self._heads = [HeadText(context, slot, layout) for slot in range(slots)]
        self._own: dict[int, States] = {}
        """float32[1, width]: the state that the head gave in the last row of each sequence that it drafts for."""
        self._score_context = min(SCORE_CONTEXT, context.num_batch)
        self._in_head = np.ones(context.model.num_tokens, dtype=bool)
        """bool[tokens]: those that have a row of logits."""

    # -- the kind of head -----------------------------------------------------------------------------------------

    @abstractmethod
    def _target_states(self, rows: Sequence[int]) -> States:
        """float32[n, state width]: the target's states of these rows of its last pass."""

    def _inputs(self, states: States) -> States:
        """float32[n, width of the context]: what the head reads in place of states of the target."""
        return states

    # -- opening --------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Time passes and reading on the empty context, so that the first decision knows what they cost."""
        self.times.set_passes(*self._timing.typical(0, 16))
        if self.ids is None:
            self._in_head = np.isfinite(self._context.logits(1)[0])
        else:
            self._in_head = np.isin(np.arange(self._context.model.num_tokens), self.ids)
        rows = min(SCORE_CONTEXT, self._context.num_batch)
        self.times.set_reading(min(self._read_arbitrary(rows) for _ in range(2)) / rows)

    def _read_arbitrary(self, rows: int) -> float:
        """Milliseconds of reading so many entries."""
        began = perf_counter_ns()
        states = np.zeros((rows, self._layout.state_width), dtype=np.float32)
        self._context.clear_batch()
        self._context.add_states([0] * rows, self._inputs(states), 0, self._spare_id)
        self._context.decode()
        self._context.own_states()  # waits for the pass, whose end nothing else waits for
        ms = ms_since(began)
        self._context.drop(self._spare_id)
        return ms

    def forget(self) -> None:
        """Return to the state after opening, except for measured costs."""
        super().forget()
        self._context.clear()
        for head in self._heads:
            head.forget()

    def use_threads(self, threads: int) -> None:
        self._context.use_threads(threads)

    def close(self) -> None:
        """Close the context, and not its model."""
        self._context.close()

    # -- what the target hands over -------------------------------------------------------------------------------

    def follow(self, passed: Pass) -> None:
        """Take the states of the rows that a pass of the target has kept; call it before the proposers observe it."""
        new = [piece for piece in passed.pieces if piece.stream.position - len(piece.tokens) == piece.stream.cached]
        # A text that continues one of another slot copies it before that slot begins another text.
        for piece in sorted(new, key=self._continues_own):
            self._heads[piece.stream.seq].begin(_cached(piece), self._heads)
        for stream, tree in zip(passed.running, passed.trees, strict=True):
            if stream.seq not in self._texts:
                continue
            accepted = tree.accepted
            tokens = [tree.root, *tree.draft.tokens[accepted].tolist()]
            rows = [tree.first, *(tree.row_of[node] for node in accepted)]
            self._extend_text(stream.seq, stream.position - len(tokens), tokens, rows)
        for piece in passed.pieces:
            count = len(piece.tokens)
            taken = range(piece.first, piece.first + count)
            self._extend_text(piece.stream.seq, piece.stream.position - count, piece.tokens.tolist(), taken)

    def _continues_own(self, piece: Piece) -> bool:
        """Whether the beginning that a prompt was given is that of the text before it in the same slot."""
        return self._heads[piece.stream.seq].shared(_cached(piece)) == piece.stream.cached

    def _extend_text(self, seq: int, position: int, tokens: list[int], rows: Sequence[int]) -> None:
        self._heads[seq].extend(position, tokens, self._target_states(rows))

    # -- the contract of a proposer -------------------------------------------------------------------------------

    def propose_batch(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[Draft]:
        try:
            return super().propose_batch(seqs, budgets)
        finally:
            for seq in seqs:
                self._heads[seq].drop_drafts()

    def knows(self, token: int) -> bool:
        return bool(self._in_head[token])

    @property
    def drafted_ids(self) -> IntArray | None:
        return None if self._in_head.all() else int_array(np.flatnonzero(self._in_head).astype(np.int32))

    def _can_draft(self, seq: int) -> bool:
        """Whether the state of the token before the last one is known."""
        head = self._heads[seq]
        return head.end == len(self._texts[seq].tokens) - 1 and head.end > head.start

    # -- the contract of a model-based proposer -------------------------------------------------------------------

    @property
    def retry_ms(self) -> float:
        return (self._score_context + SCORED_ROWS) * self.times.score_row_ms

    def reading_ms(self, seq: int) -> float:
        """The time to read the entries before that of the last token; without end where their states are not known."""
        return self._num_unread(seq) * self.times.read_token_ms if self._can_draft(seq) else inf

    def _num_unread(self, seq: int) -> int:
        """Entries to read before that of the last token."""
        return max(0, len(self._texts[seq].tokens) - 1 - self._heads[seq].stored)

    def read(self, seqs: Sequence[int], ms: float) -> None:
        began = perf_counter_ns()
        done = False
        for seq in seqs:
            while self._can_draft(seq) and self._num_unread(seq):
                left = ms - ms_since(began)
                if done and left <= 0:
                    return
                rows = self._context.num_batch
                if left < rows * self.times.read_token_ms:
                    rows = min(rows, max(READING_PIECE, int(left / self.times.read_token_ms)))
                self._read_piece(seq, min(rows, self._num_unread(seq)))
                done = True

    def score(self, seq: int) -> tuple[int, int]:
        text, head = self._texts[seq], self._heads[seq]
        if not self._can_draft(seq) or (text.sampler is not None and text.sampler.sampling.temperature):
            return 0, 0
        stop = len(text.tokens) - 1
        scored = min(SCORED_ROWS, len(text.tokens) - text.num_prompt, stop - head.first)
        if scored <= 0:
            return 0, 0
        began = perf_counter_ns()
        first = max(head.first, stop - scored - self._score_context)
        context = self._context
        context.drop(self._spare_id)  # what an interrupted pass may have left
        inputs = self._inputs(head.states(first, stop))
        for start, end, wanted in ((first, stop - scored, False), (stop - scored, stop, True)):
            if start < end:
                context.clear_batch()
                tokens, states = text.tokens[start:end], inputs[start - first : end - first]
                context.add_states(tokens, states, self._layout.position(start), self._spare_id, wanted=wanted)
                context.decode()
        best = context.logits(scored).argmax(axis=1)
        best = best if self.ids is None else self.ids[best]
        context.drop(self._spare_id)
        self.times.scored(stop - first, ms_since(began))
        return int((best == int_array(text.tokens[-scored:])).sum()), scored

    def time_pass(self) -> None:
        slot = max(range(len(self._heads)), key=lambda slot: self._heads[slot].stored)
        self.times.timed(self._timing.one_row_ms(slot, self._layout.position(self._heads[slot].stored)))

    def logits_along(self, prompt: IntArray, answer: IntArray, target_slot: int | None = None) -> Iterator[Logits]:
        """As in the base class. The target reads the text, too, and its cache is empty afterwards."""
        text, head, first = [*prompt.tolist(), *answer[:-1].tolist()], self._heads[0], len(prompt)
        target, context = self._target, self._context
        self.forget()
        target.clear()
        for at in range(0, len(text), target.num_batch):
            part = text[at : at + target.num_batch]
            target.clear_batch()
            target.add_span(part, at, 0, wanted=False, last=True)
            target.decode()
            head.extend(at, part, self._target_states(range(len(part))))
        target.clear()
        for at in (*range(head.first, first, context.num_batch), *range(first, len(text), SCORED_ROWS)):
            wanted = at >= first
            stop = min(at + (SCORED_ROWS if wanted else context.num_batch), len(text) if wanted else first)
            inputs = self._inputs(head.states(at, stop))
            context.clear_batch()
            context.add_states(text[at:stop], inputs, self._layout.position(at), 0, wanted=wanted)
            context.decode()
            if wanted:
                yield from context.logits(stop - at)
        self.forget()

    # -- passes of the head ---------------------------------------------------------------------------------------

    def _catch_up(self, seqs: Sequence[int]) -> Logits:
        room = min(READ_WITH_ROOT, self._context.num_batch // len(seqs))
        self.read([seq for seq in seqs if self._num_unread(seq) >= room], inf)
        began = perf_counter_ns()
        spans, states = [], []
        for seq in seqs:
            head, stop = self._heads[seq], len(self._texts[seq].tokens)
            head.cut_stored(stop - 1)  # where it was drafted for before: the last entry is read again for its logits
            spans.append((seq, head.stored))
            states.append(head.states(head.stored, stop))
        inputs = np.split(self._inputs(np.concatenate(states)), np.cumsum([len(one) for one in states])[:-1])
        logits = self._evaluate(
            [(seq, self._texts[seq].tokens[at:], own, at) for (seq, at), own in zip(spans, inputs, strict=True)]
        )
        for seq in seqs:
            tokens = self._texts[seq].tokens
            self._heads[seq].add_stored(len(tokens), tokens[-1])
        self.times.drafted(len(seqs), ms_since(began))
        return logits

    def _go_on(self, chains: Sequence[Chain]) -> Logits:
        rows = []
        for chain in chains:
            entry = self._heads[chain.seq].stored + len(chain.path) - 1
            rows.append((chain.seq, [chain.tokens[chain.last]], self._own[chain.seq], entry))
        return self._evaluate(rows)

    def _read_piece(self, seq: int, count: int) -> None:
        """Read the next entries of a text, without logits."""
        began = perf_counter_ns()
        head = self._heads[seq]
        first, stop = head.stored, head.stored + count
        self._read_entries(seq, first, stop)
        head.add_stored(stop, self._texts[seq].tokens[stop - 1])
        self.times.read(count, ms_since(began))

    def _read_entries(self, seq: int, first: int, stop: int) -> None:
        states = self._inputs(self._heads[seq].states(first, stop))
        self._evaluate([(seq, self._texts[seq].tokens[first:stop], states, first)], wanted=False)

    def _evaluate(
        self, parts: Sequence[EvaluatedPart], *, wanted: bool = True, context: HeadContext | None = None
    ) -> Logits:
        """float32[n, tokens]: the logits after the last entry of each part, in one pass, whose states are kept.

        context  where the head has several
        """
        context, lasts = context or self._context, []
        context.clear_batch()
        try:
            for seq, tokens, states, entry in parts:
                context.add_states(tokens, states, self._layout.position(entry), seq, last=wanted)
                lasts.append(context.rows - 1)
            context.decode()
        except BaseException:  # also an interrupt: some cells may have been filled
            for seq, _, _, _ in parts:
                self._heads[seq].drop_cells()
            raise
        own = context.own_states()  # also where they are not needed: waits for the pass
        if not wanted:
            return np.zeros((0, 0), dtype=np.float32)
        for (seq, _, _, _), place in zip(parts, range(len(parts)) if context.wanted_only else lasts, strict=True):
            self._own[seq] = own[place : place + 1].copy()
        if not context.all_or_none:
            return context.logits(len(parts))
        every = context.logits(context.rows)
        return every[lasts] if len(lasts) > 1 else every[lasts[0] : lasts[0] + 1]


def _cached(piece: Piece) -> IntArray:
    """int32[n]: the beginning of a prompt that the target had cached."""
    return piece.stream.prompt[: piece.stream.cached]
