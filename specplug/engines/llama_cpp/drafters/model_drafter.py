"""A second model that drafts: chains of its own likeliest tokens, with runners-up where the profile asks for them.

Depends neither on the planner nor on the target, except that it may copy the target's KV cells of a text that both have
read, and draw with a copy of the target's sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from math import inf
from time import perf_counter_ns

import numpy as np

from specplug.core import EMPTY, Draft, DraftAdvice, IntArray, Likeliest, Requires, Step
from specplug.drafts.chains import num_agreeing
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.drafters.chain import (
    Chain,
    bucket_of,
    buckets_of,
    likeliest_tokens,
    probability_of,
    runner_up,
)
from specplug.engines.llama_cpp.drafters.drafter_times import DrafterTimes
from specplug.engines.llama_cpp.drafters.slot_cells import SLACK, SlotCells
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.planning.constants import READING_PIECE, RETRY_TOKENS

SCORE_CONTEXT = 64
"""Tokens that the drafter reads before those on which it is scored. Chosen."""

SCORED_ROWS = RETRY_TOKENS
"""Most tokens on which it is scored: rows with logits of one pass."""


class ModelDrafter:
    """Drafts with a model of its own, for any number of sequences in one pass.

    Source: speculative decoding (arXiv 2211.17192); trimmed heads, VocabTrim (arXiv 2506.22694). A draft ends where the
    next token no longer pays, as in SpecDec++ (arXiv 2405.19715), by measured costs instead of a trained threshold. A
    window of first and recent tokens follows StreamingLLM (arXiv 2309.17453).
    A token's bucket is the probability that the drafter assigns to it, so the planner learns how far to trust it.
    State: the tokens of running sequences, and per slot the KV cells of the tokens that the drafter has read, which a
    prompt with the same beginning uses again.
    Requires: nothing of the target.
    Cost per draft token: a pass of the drafter over one row for each sequence.
    """

    requires = Requires()

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
        window: tuple[int, int] | None = None,
        target_cells: Callable[[int], bytes] | None = None,
        cell_bytes: int = 0,
    ) -> None:
        """
        context       with the sequence ids 0..slots, of which the last one is used for scoring
        ids           int32[rows of the head]: the token of each row; None if row i belongs to token i
        max_tokens    longest text of one sequence
        end_tokens    tokens after which nothing is drafted
        window        number of first and of recent tokens that the drafter reads of a text; None for all
        target_cells  returns the target's cells of a sequence, without its last token; None if they do not fit
        cell_bytes    size of one such cell
        """
        self.buckets = buckets_of(branches)
        self.max_draft = max_draft
        self.window = window
        self.passes = 0
        """Passes run so far in order to draft."""
        self.advice: DraftAdvice | None = None
        """Tells how far to draft."""
        self.judged_top = 0
        self.shared_cells = [SlotCells(context, slot, window) for slot in range(slots)]
        """The cells of each slot; their tokens are kept for a prompt that begins alike."""
        self._context = context
        self.ids = ids
        self._known = frozenset(ids.tolist()) if ids is not None else frozenset()
        self._max_tokens = max_tokens
        self._branches = branches
        self._end_tokens = end_tokens
        self._target_cells = target_cells if window is None else None
        self._scoring_id = slots
        self._score_rows = min(SCORE_CONTEXT + SCORED_ROWS, context.num_batch)
        self._texts: dict[int, _Text] = {}
        self.times = DrafterTimes(slots, cell_bytes)

    def warm_up(self) -> None:
        """Time passes and reading on the empty context, so that the first decision knows what they cost."""
        self.time_passes(16)
        times = []
        for _ in range(2):
            began = perf_counter_ns()
            self._context.clear_batch()
            self._context.add_span([0] * self._score_rows, 0, self._scoring_id, wanted=False, last=True)
            self._context.decode()
            times.append(_ms_since(began) / self._score_rows)
            self._context.drop(self._scoring_id)
        self.times.set_reading(min(times))

    def time_passes(self, count: int) -> None:
        """Time so many passes of one row, and of a row for each slot.

        It takes the lower quartile: disturbances make passes longer, and a cost that is too high is corrected late.
        """
        rows = (1, len(self.shared_cells))
        one, all_ = (float(np.quantile([self._time_rows(n) for _ in range(count)], 0.25)) for n in rows)
        self.times.set_passes(one, all_)

    def forget(self) -> None:
        """Return to the state after opening, except for measured costs."""
        self._context.clear()
        for cells in self.shared_cells:
            cells.clear()
        self._texts.clear()
        self.advice = None
        self.judged_top = 0
        self.times.forget_copies()

    def use_threads(self, threads: int) -> None:
        self._context.use_threads(threads)

    def close(self) -> None:
        self._context.close()
        self._context.model.close()

    def use_sampler(self, seq: int, sampler: Sampler) -> None:
        """Draw draft tokens as the sequence's own tokens are drawn: same random numbers, penalties and grammar."""
        self._texts[seq].sampler = sampler

    # -- the contract of a proposer -------------------------------------------------------------------------------

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._texts[seq] = _Text(prompt.tolist(), len(prompt))
        self.shared_cells[seq].start(prompt)

    def propose(self, seq: int, budget: int) -> Draft:
        return self.propose_batch([seq], [budget])[0]

    def propose_batch(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[Draft]:
        """One pass of the drafter per depth, for all sequences whose chains go on."""
        chains = {}
        for seq, budget in zip(seqs, budgets, strict=True):
            text = self._texts[seq]
            text.drafted, text.likeliest = [], []
            most = min(budget, self.max_draft, self._max_tokens - len(text.tokens))
            if most > 0:
                draws = text.sampler.copy(self.ids) if text.sampler is not None else None
                chains[seq] = Chain(seq, budget, most, draws)
        try:
            self._draft(list(chains.values()))
        finally:
            for chain in chains.values():
                if chain.draws is not None:
                    chain.draws.close()
        return [chains[seq].draft() if seq in chains else EMPTY for seq in seqs]

    def observe(self, seq: int, step: Step) -> None:
        text = self._texts[seq]
        for token in step.emitted:
            self.shared_cells[seq].emitted(token, len(text.tokens))
            text.tokens.append(token)
        if text.drafted and self.advice is not None:
            right = num_agreeing(text.drafted, step.emitted)
            self.advice.learn(seq, right, min(len(text.drafted), len(step.emitted), right + 1))
        text.drafted, text.likeliest = [], []

    def end(self, seq: int) -> None:
        del self._texts[seq]
        cells = self.shared_cells[seq]
        cells.cut(cells.valid)

    def likeliest(self, seq: int) -> list[Likeliest]:
        return self._texts[seq].likeliest

    def knows(self, token: int) -> bool:
        return self.ids is None or token in self._known

    # -- the contract of a model-based proposer -------------------------------------------------------------------

    @property
    def retry_ms(self) -> float:
        return self._score_rows * self.times.score_row_ms

    def pass_ms(self, rows: int) -> float:
        return self.times.pass_ms(rows)

    def reading_ms(self, seq: int) -> float:
        """The time to read the text before the last token, or to copy its cells from the target's cache."""
        return min(self._reading_ms(seq), self._copying_ms(seq))

    def _reading_ms(self, seq: int) -> float:
        return (self.shared_cells[seq].num_unread(len(self._texts[seq].tokens)) - 1) * self.times.read_token_ms

    def _copying_ms(self, seq: int) -> float:
        return inf if self._target_cells is None else (len(self._texts[seq].tokens) - 1) * self.times.copied_token_ms

    def read(self, seqs: Sequence[int], ms: float) -> None:
        began = perf_counter_ns()
        done = False
        for seq in seqs:
            if done and _ms_since(began) >= ms:
                return
            text, cells = self._texts[seq].tokens, self.shared_cells[seq]
            if self._target_cells is not None and self._copying_ms(seq) < self._reading_ms(seq):
                copying = perf_counter_ns()
                cells.restore(text[:-1], self._target_cells(seq))
                self.times.copied(len(text) - 1, _ms_since(copying))
                done = True
            while cells.read < len(text) - 1:
                left = ms - _ms_since(began)
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
        part = text.tokens[-self._score_rows - 1 :]
        before = len(part) - 1 - scored
        began = perf_counter_ns()
        context, id_ = self._context, self._scoring_id
        context.drop(id_)  # what an interrupted pass may have left
        context.clear_batch()
        context.add_span(part[:before], 0, id_, wanted=False)
        context.add_span(part[before:-1], before, id_, wanted=True)
        context.decode()
        best = context.logits(scored).argmax(axis=1)
        context.drop(id_)
        self.times.scored(len(part) - 1, _ms_since(began))
        tokens = best if self.ids is None else self.ids[best]
        return int((tokens == np.asarray(part[-scored:])).sum()), scored

    def time_pass(self) -> None:
        self.times.timed(self._time_rows(1))

    def logits_along(self, prompt: IntArray, answer: IntArray) -> Iterator[Logits]:
        """float32[rows of the head] after a prompt and each token of `answer` (int32[n]) but the last, given the tokens
        before it; each is overwritten by later passes. No sequence may run."""
        for used in self.shared_cells:
            used.clear()
        context, id_ = self._context, self._scoring_id
        context.drop(id_)
        cells = SlotCells(context, id_, self.window)
        text = [*prompt.tolist(), int(answer[0])]
        while cells.read < len(prompt):
            piece = cells.prepare(text, context.num_batch, with_last=False)
            context.clear_batch()
            context.add_span(piece, cells.next_position, id_, wanted=False, last=True)
            context.decode()
            cells.append(piece, of_text=True)
        for at in range(0, len(answer) - 1, SCORED_ROWS):
            part = answer[at : min(at + SCORED_ROWS, len(answer) - 1)].tolist()
            context.clear_batch()
            context.add_span(part, cells.next_position, id_, wanted=True)
            context.decode()
            cells.append(part, of_text=True)
            yield from context.logits(len(part))
        context.drop(id_)

    # -- drafting -------------------------------------------------------------------------------------------------

    def _draft(self, chains: list[Chain]) -> None:
        """Fill the chains, one depth after the other."""
        if not chains:
            return
        logits = self._catch_up([chain.seq for chain in chains])
        began = perf_counter_ns()
        while True:
            self.passes += 1
            rows = len(chains)
            chains = [chain for row, chain in enumerate(chains) if self._extend(chain, logits[row], rows)]
            if not chains:
                return
            logits = self._evaluate([(chain.seq, [chain.tokens[chain.last]]) for chain in chains], of_text=False)
            now = perf_counter_ns()
            self.times.drafted(len(chains), (now - began) / 1e6)
            began = now

    def _extend(self, chain: Chain, logits: Logits, rows: int) -> bool:
        """Add the likeliest token, or the one that is drawn; whether the chain should go on."""
        best = int(logits.argmax()) if chain.draws is None else chain.draws.draw(logits)
        if best is None:
            return False
        token, text, probability = self.token_of(best), self._texts[chain.seq], probability_of(logits, best)
        if self.judged_top:
            text.likeliest.append(likeliest_tokens(logits, self.ids, self.judged_top, best, probability))
        chain.add_last(token, bucket_of(probability))
        text.drafted.append(token)
        if self._branches > 1 and len(chain.tokens) < chain.budget:
            second, bucket = runner_up(logits, best)
            chain.add_runner_up(self.token_of(second), bucket)
        if chain.is_full or token in self._end_tokens:
            return False
        return self.advice is None or self.advice.another_pays(chain.seq, chain.path, rows)

    def token_of(self, row: int) -> int:
        """The token of a row of the head."""
        return row if self.ids is None else int(self.ids[row])

    # -- passes of the drafter ------------------------------------------------------------------------------------

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

    def _read_piece(self, seq: int, text: Sequence[int], most: int) -> None:
        """Read the next tokens of a text before its last one, at most so many."""
        began = perf_counter_ns()
        tokens = self.shared_cells[seq].prepare(text, most, with_last=False)
        self._evaluate([(seq, tokens)], of_text=True)
        self.times.read(len(tokens), _ms_since(began))

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

    def _time_rows(self, rows: int) -> float:
        """Milliseconds of drafting one arbitrary token for each of so many empty sequences."""
        began = perf_counter_ns()
        self._context.clear_batch()
        ids = [self._scoring_id] if rows == 1 else range(rows)
        for id_ in ids:
            self._context.drop(id_)
            self._context.add_span([0], 0, id_, wanted=True)
        self._context.decode()
        for row in self._context.logits(rows):
            probability_of(row, int(row.argmax()))
        ms = _ms_since(began)
        for id_ in ids:
            self._context.drop(id_)
        return ms


@dataclass(slots=True)
class _Text:
    """One sequence: its tokens, the length of its prompt, and its latest chain, with the likeliest at each place."""

    tokens: list[int]
    num_prompt: int
    sampler: Sampler | None = None
    drafted: list[int] = field(default_factory=list)
    likeliest: list[Likeliest] = field(default_factory=list)


def cells_per_slot(max_tokens: int, max_draft: int, window: tuple[int, int] | None) -> int:
    """KV cells that one sequence needs at most."""
    # Recent tokens are removed after others were added, which are no more than the window has.
    text = max_tokens if window is None else min(max_tokens, window[0] + 2 * window[1] + SLACK)
    return text + max_draft + 1


def _ms_since(began_ns: int) -> float:
    return (perf_counter_ns() - began_ns) / 1e6
