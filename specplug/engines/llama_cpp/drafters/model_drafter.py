"""A second model that drafts: chains of its own likeliest tokens, with runners-up where the profile asks for them.

Depends neither on the planner nor on the target, except that it may copy the target's KV cells of a text that both have
read, and draw with a copy of the target's sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from math import inf
from time import perf_counter_ns

import numpy as np

from specplug.core import IntArray, Step, int_array
from specplug.drafts.retrieval import Span, Window
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.drafters.chain import Chain
from specplug.engines.llama_cpp.drafters.chain_drafter import SCORE_CONTEXT, SCORED_ROWS, ChainDrafter, ms_since
from specplug.engines.llama_cpp.drafters.drafter_times import DrafterTimes
from specplug.engines.llama_cpp.drafters.pass_timing import PassTiming
from specplug.engines.llama_cpp.drafters.slot_cells import SlotCells
from specplug.engines.llama_cpp.drafters.text_logits import likeliest_at_end, logits_of, read
from specplug.planning.constants import READING_PIECE

FEWEST_BEFORE_CHOICE = 64
"""Fewest tokens that are emitted before the parts of a text that a window keeps are chosen again. Chosen."""


class ModelDrafter(ChainDrafter):
    """Drafts with a model of its own, for any number of sequences in one pass.

    Source: speculative decoding (arXiv 2211.17192); trimmed heads, VocabTrim (arXiv 2506.22694). A window of first,
    retrieved and recent tokens: see `drafts/retrieval.py`. The retrieved ones are chosen again once rejected draft
    tokens have taken as long as reading others would, and reading is expected to pay.
    State: the tokens of running sequences, and per slot the KV cells of the tokens that the drafter has read, which a
    prompt with the same beginning uses again.
    Requires: nothing of the target.
    Cost per draft token: a pass of the drafter over one row for each sequence.
    """

    def __init__(
        self,
        context: Context,
        ids: IntArray | None,
        *,
        slots: int,
        max_tokens: int,
        max_draft: int,
        branches: int,
        end_tokens: Set[int] = frozenset(),
        is_control: Callable[[int], bool] = lambda token: False,
        window: Window | None = None,
        target_cells: Callable[[int, Sequence[Span]], bytes] | None = None,
        cell_bytes: int = 0,
    ) -> None:
        """
        context       with the sequence ids 0..slots, of which the last one is used for scoring
        ids           int32[rows of the head]: the token of each row; None if row i belongs to token i
        max_tokens    longest text of one sequence
        end_tokens    tokens after which nothing is drafted
        is_control    tells the tokens that separate the turns of a conversation
        window        the tokens that the drafter reads of a text; None for all
        target_cells  returns the target's cells of parts of a sequence, which lacks its last token; None if they do not
                      fit
        cell_bytes    size of one such cell
        """
        super().__init__(
            ids,
            DrafterTimes(slots, cell_bytes),
            max_tokens=max_tokens,
            max_draft=max_draft,
            branches=branches,
            end_tokens=end_tokens,
        )
        self._context = context
        self._is_control = is_control
        self.window = window
        self.shared_cells = [self._new_cells(slot) for slot in range(slots)]
        """The cells of each slot; their tokens are kept for a prompt that begins alike."""
        self._target_cells = target_cells
        self._scoring_id = slots
        self._timing = PassTiming(context, slots, self._scoring_id)
        self._score_rows = min(SCORE_CONTEXT + SCORED_ROWS, context.num_batch)

    def warm_up(self) -> None:
        """Time passes and reading on the empty context, so that the first decision knows what they cost."""
        self.time_passes(16)
        self.times.set_reading(min(self._timing.read_ms(self._score_rows) / self._score_rows for _ in range(2)))

    def time_passes(self, count: int) -> None:
        """Time so many passes of one row, after a window's tokens, and of a row for each slot, on the empty context."""
        filled = 0 if self.window is None else min(self.window.size, self._max_tokens)
        self.times.set_passes(*self._timing.typical(filled, count))

    def forget(self) -> None:
        """Return to the state after opening, except for measured costs."""
        super().forget()
        self._context.clear()
        for cells in self.shared_cells:
            cells.clear()
        self.times.forget_copies()

    def use_threads(self, threads: int) -> None:
        self._context.use_threads(threads)

    def close(self) -> None:
        """Close the context, and not its model."""
        self._context.close()

    # -- the contract of a proposer -------------------------------------------------------------------------------

    def begin(self, seq: int, prompt: IntArray) -> None:
        super().begin(seq, prompt)
        self.shared_cells[seq].start(prompt)

    def observe(self, seq: int, step: Step) -> None:
        for known, token in enumerate(step.emitted, len(self._texts[seq].tokens)):
            self.shared_cells[seq].emitted(token, known)
        super().observe(seq, step)
        if self.window is not None and self.window.retrieved:
            self._choose_again(seq)

    def end(self, seq: int) -> None:
        super().end(seq)
        cells = self.shared_cells[seq]
        cells.cut(cells.valid)

    # -- the contract of a model-based proposer -------------------------------------------------------------------

    @property
    def retry_ms(self) -> float:
        return self._score_rows * self.times.score_row_ms

    def reading_ms(self, seq: int) -> float:
        """The time to read the text before the last token, or to copy its cells from the target's cache."""
        return min(self._reading_ms(seq), self._copying_ms(seq))

    @property
    def read_token_ms(self) -> float:
        """Time to read one of many tokens, or to copy its cell, milliseconds."""
        times = self.times
        return times.read_token_ms if self._target_cells is None else min(times.read_token_ms, times.copied_token_ms)

    def _reading_ms(self, seq: int) -> float:
        return (self.shared_cells[seq].num_unread(len(self._texts[seq].tokens)) - 1) * self.times.read_token_ms

    def _copying_ms(self, seq: int) -> float:
        if self._target_cells is None:
            return inf
        return self.shared_cells[seq].num_kept(len(self._texts[seq].tokens) - 1) * self.times.copied_token_ms

    def read(self, seqs: Sequence[int], ms: float) -> None:
        began = perf_counter_ns()
        done = False
        for seq in seqs:
            if done and ms_since(began) >= ms:
                return
            text, cells = self._texts[seq].tokens, self.shared_cells[seq]
            if self._target_cells is not None and self._copying_ms(seq) < self._reading_ms(seq):
                self._copy(cells, seq, text[:-1])
                done = True
            while cells.read < len(text) - 1:
                left = ms - ms_since(began)
                if done and left <= 0:
                    return
                rows = self._context.num_batch
                if left < rows * self.times.read_token_ms:
                    rows = min(rows, max(READING_PIECE, int(left / self.times.read_token_ms)))
                self._read_piece(seq, text, rows)
                done = True

    def score(self, seq: int) -> tuple[int, int]:
        text = self._texts[seq]
        scored = min(SCORED_ROWS, len(text.tokens) - text.num_prompt)
        # Drafts of a sampled text are drawn, too: agreement with the likeliest tokens says little about them.
        if not scored or (text.sampler is not None and text.sampler.sampling.temperature):
            return 0, 0
        began = perf_counter_ns()
        rows, best = self._scored(seq, scored)
        self.times.scored(rows, ms_since(began))
        tokens = best if self.ids is None else self.ids[best]
        return int((tokens == np.asarray(text.tokens[-scored:])).sum()), scored

    def time_pass(self) -> None:
        slot = max(range(len(self.shared_cells)), key=lambda slot: len(self.shared_cells[slot].tokens))
        self.times.timed(self._timing.one_row_ms(slot, self.shared_cells[slot].next_position))

    def logits_along(self, prompt: IntArray, answer: IntArray, target_slot: int | None = None) -> Iterator[Logits]:
        for used in self.shared_cells:
            used.clear()
        context, id_ = self._context, self._scoring_id
        cells = self._new_cells(id_)
        cells.clear()
        text = prompt.tolist()
        cells.start(prompt)
        if target_slot is not None:
            self._copy(cells, target_slot, text)
        read(context, cells, id_, [*text, int(answer[0])])
        yield from logits_of(context, cells, id_, answer[:-1].tolist(), SCORED_ROWS)
        context.drop(id_)

    # -- passes of the drafter ------------------------------------------------------------------------------------

    def _scored(self, seq: int, scored: int) -> tuple[int, IntArray]:
        """The likeliest rows of the head at the last `scored` tokens of a text, and the rows of the pass."""
        text, context, id_ = self._texts[seq].tokens, self._context, self._scoring_id
        if self.window is not None and self._target_cells is not None:  # what it keeps of a text is cheap to copy
            cells = self.shared_cells[seq]
            try:
                self._copy(cells, seq, text[: -scored - 1])
                found = logits_of(context, cells, seq, text[-scored - 1 : -1], SCORED_ROWS)
                return scored, int_array([int(logits.argmax()) for logits in found])
            except BaseException:  # also an interrupt: some cells may have been filled
                cells.clear()
                raise
        part = text[-self._score_rows - 1 :]
        return len(part) - 1, likeliest_at_end(context, id_, part, scored)

    def _catch_up(self, seqs: Sequence[int]) -> Logits:
        """float32[n, rows of the head]: the logits after the last token of each sequence, whose text is then read."""
        room = self._context.num_batch // len(seqs)
        behind = [
            seq
            for seq in seqs
            if self.shared_cells[seq].num_unread(len(self._texts[seq].tokens)) > room
            or self._copying_ms(seq) < self._reading_ms(seq)
        ]
        self.read(behind, inf)
        parts = []
        for seq in seqs:
            text, cells = self._texts[seq].tokens, self.shared_cells[seq]
            part = cells.prepare(text, room, with_last=True)
            while cells.read + len(part) < len(text):  # the first part of a window
                self._read_piece(seq, text, room)
                part = cells.prepare(text, room, with_last=True)
            parts.append((seq, part))
        return self._evaluate(parts, of_text=True)

    def _go_on(self, chains: Sequence[Chain]) -> Logits:
        return self._evaluate([(chain.seq, [chain.tokens[chain.last]]) for chain in chains], of_text=False)

    def _read_piece(self, seq: int, text: Sequence[int], most: int) -> None:
        """Read the next tokens of a text before its last one, at most so many."""
        began = perf_counter_ns()
        tokens = self.shared_cells[seq].prepare(text, most, with_last=False)
        self._evaluate([(seq, tokens)], of_text=True)
        self.times.read(len(tokens), ms_since(began))

    def _evaluate(self, parts: Sequence[tuple[int, Sequence[int]]], *, of_text: bool) -> Logits:
        """float32[n, rows of the head]: the logits after the last token of each part, in one pass."""
        context = self._context
        context.clear_batch()
        for seq, tokens in parts:
            context.add_span(tokens, self.shared_cells[seq].next_position, seq, wanted=False, last=True)
        try:
            context.decode()
            for seq, tokens in parts:
                self.shared_cells[seq].append(tokens, of_text=of_text)
        except BaseException:  # also an interrupt: some cells may have been filled
            for seq, _ in parts:
                self.shared_cells[seq].clear()
            raise
        return context.logits(len(parts))

    def _copy(self, cells: SlotCells, target_slot: int, text: Sequence[int]) -> None:
        """Copy the target's cells of the parts of a text that are kept."""
        assert self._target_cells is not None
        began = perf_counter_ns()
        spans = cells.spans(text)
        cells.restore(text, spans, self._target_cells(target_slot, spans))
        self.times.copied(max(cells.valid, 1), ms_since(began))

    def _choose_again(self, seq: int) -> None:
        """Choose the retrieved parts of a text again, where that is due and is expected to pay."""
        text, cells = self._texts[seq], self.shared_cells[seq]
        known = len(text.tokens)
        price_ms = min(cells.num_kept(known) * self.times.read_token_ms, self._copying_ms(seq))
        if text.lost_ms < price_ms or known - text.chosen_at < FEWEST_BEFORE_CHOICE:
            return
        if self.advice is None or self.advice.reading_pays(seq, price_ms):
            text.lost_ms, text.chosen_at = 0.0, known
            cells.choose_again(text.tokens[:-1])

    def _new_cells(self, id_: int) -> SlotCells:
        return SlotCells(self._context, id_, self.window, self._is_control)
