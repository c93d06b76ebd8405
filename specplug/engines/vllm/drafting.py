"""From one pass of the target over a batch to the drafts for the next: what the class that vLLM calls does.

Knows batches as vLLM's runner lays them out: rows that move, tokens in one array, prompts read in pieces. Imports no
vllm, so that its cost can be measured and its edges tested without an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray, int_array
from specplug.drafts.chains import NOTHING, ChainSteps
from specplug.engines.vllm.counts import Counts
from specplug.engines.vllm.request_table import Requests, Tracked, continues, new_tokens, prompt_of
from specplug.planning.batch_speculator import BatchPlan, BatchSpeculator
from specplug.planning.cost import BatchCost

PROMPT_TOKENS = 8192
"""Most tokens of new prompts that the proposers are shown in one step, the first prompt whole: reading 8192 takes
20 ms, and every running request waits for it."""

TopIds = Callable[[IntArray, int], IntArray]
"""(rows of the pass int32[r], k) -> int32[r, k], the most likely ids after each."""


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One pass, as the runner knows it after sampling.

    request_ids  by row
    sampled      by row the new tokens; empty while a prompt is read in pieces
    num_drafts   by row the guesses that were verified; None for none at all
    num_tokens   int[>= n]  by row, of prompt and answer, the new ones included
    num_prompt   int[>= n]  of them the prompt's
    token_ids    int[>= n, >= max tokens]
    num_read     tokens that the target read, prompts included
    live         every request that is not finished, those that wait included
    params       a request's sampling parameters, by id
    top_ids      None where nobody asked for them
    """

    request_ids: Sequence[str]
    sampled: Sequence[Sequence[int]]
    num_drafts: Sequence[int] | None
    num_tokens: npt.NDArray[Any]
    num_prompt: npt.NDArray[Any]
    token_ids: npt.NDArray[Any]
    num_read: int
    live: Collection[str] | Mapping[str, Any]
    params: Callable[[str], Any]
    top_ids: TopIds | None = None


class Drafting:
    """Drafts for vLLM, a step at a time."""

    def __init__(
        self,
        speculator: BatchSpeculator,
        cost: BatchCost,
        *,
        max_model_len: int,
        adaptive: bool = True,
        clock: Callable[[], int] = perf_counter_ns,
    ) -> None:
        """adaptive  lets real passes correct the cost curves; off where several ranks must draft alike"""
        self.speculator = speculator
        self.cost = cost
        self.counts = Counts(speculator.names)
        self.requests = Requests(max_model_len)
        self._adaptive = adaptive
        self._clock = clock
        self._returned = 0
        self._ids: list[str] = []
        self._context = 0

    @property
    def wants_topk(self) -> int:
        """How many top ids per row the pass under way should bring; 0 for none."""
        return self.speculator.wants_topk

    def step(self, done: Pass) -> list[list[int]]:
        """Guesses by row, at most k each; often none."""
        began = self._clock()
        n = len(done.sampled)
        timed = self._see_pass(done, n, began)
        for request_id in self.requests.finished(done.live):
            self._end(request_id)
        drafts: list[list[int]] = [[] for _ in range(n)]
        if self.speculator.due(n if timed else 0):
            self._draft(done, n, drafts)
        self._ids = list(done.request_ids)
        self._returned = self._clock()
        self.counts.draft_ns += self._returned - began
        return drafts

    # -- what the pass cost ---------------------------------------------------------------------------------------

    def _see_pass(self, done: Pass, n: int, now: int) -> bool:
        """Whether a pass tells what it took: one that only decoded, for the requests of the pass before, so that
        nothing else was waited for."""
        rows = n + (sum(done.num_drafts) if done.num_drafts is not None else 0)
        if done.num_read != rows:
            return False
        self.counts.steps += 1
        self.counts.rows += rows
        if self._ids != done.request_ids:
            return False
        if self._adaptive:
            self.cost.observe(n, rows, self._context, (now - self._returned) / 1e6)
        return True

    # -- drafting --------------------------------------------------------------------------------------------------

    def _draft(self, done: Pass, n: int, drafts: list[list[int]]) -> None:
        lengths: list[int] = done.num_tokens[:n].tolist()
        self._context = sum(lengths) // max(1, n)
        old: list[tuple[int, Tracked]] = []
        known: list[tuple[int, Tracked]] = []
        shown = 0
        for row, request_id in enumerate(done.request_ids[:n]):
            if not done.sampled[row]:
                continue
            tracked = self.requests.get(request_id)
            if tracked is not None and not tracked.limit:
                continue
            line, length = done.token_ids[row], lengths[row]
            if tracked is not None and not continues(tracked, line, length):
                self._end(request_id)
                tracked = None
            if tracked is None:
                if shown and shown + length > PROMPT_TOKENS:
                    continue
                shown += length
                tracked = self.requests.add(request_id, int(done.num_prompt[row]), done.params(request_id))
                if not tracked.limit:
                    continue
                self.speculator.begin(tracked.seq, prompt_of(line, length))
                new_tokens(tracked, line, length)
            elif length > tracked.known:
                old.append((row, tracked))
            known.append((row, tracked))
        if old:
            self._observe(done, old, lengths)
        budgets = int_array([min(tracked.limit, tracked.end - lengths[row] - 1) for row, tracked in known])
        plan = self.speculator.plan([tracked.seq for _, tracked in known], n, self._context, np.maximum(budgets, 0))
        self._send(plan, known, drafts)

    def _observe(self, done: Pass, old: Sequence[tuple[int, Tracked]], lengths: Sequence[int]) -> None:
        """Tell the proposers what came of requests that they know."""
        seqs: list[int] = []
        emitted: list[list[int]] = []
        before: list[int] = []
        for row, tracked in old:
            before.append(tracked.last)
            tokens = new_tokens(tracked, done.token_ids[row], lengths[row])
            before += tokens[:-1]
            seqs.append(tracked.seq)
            emitted.append(tokens)
        after = [token for tokens in emitted for token in tokens]
        if done.num_drafts is not None:
            self._score(done, old)
        began = self._clock()
        read, topk = self._top_ids(done, old)
        steps = ChainSteps(seqs, emitted, int_array(before), int_array(after), read, topk)
        self.speculator.observe(steps, self._clock() - began if topk is not None else 0)

    def _score(self, done: Pass, old: Sequence[tuple[int, Tracked]]) -> None:
        """Count what was verified of what was sent."""
        assert done.num_drafts is not None
        for row, tracked in old:
            accepted = len(done.sampled[row]) - 1
            if accepted and done.num_drafts[row]:
                self.counts.scored(tracked.sent[:accepted])

    def _top_ids(self, done: Pass, old: Sequence[tuple[int, Tracked]]) -> tuple[IntArray, IntArray | None]:
        """The tokens that the pass read on the way that came true, and the top ids after each."""
        k = self.speculator.wants_topk
        if done.top_ids is None or not k:
            return int_array([]), None
        n = len(done.sampled)
        heights = np.ones(n, dtype=np.int64) if done.num_drafts is None else np.asarray(done.num_drafts[:n]) + 1
        starts = (np.cumsum(heights) - heights).tolist()
        rows: list[int] = []
        read: list[int] = []
        for row, _ in old:
            count = len(done.sampled[row])
            end = int(done.num_tokens[row]) - 1
            rows += range(starts[row], starts[row] + count)
            read += done.token_ids[row, end - count : end].tolist()
        return int_array(read), done.top_ids(int_array(rows), k)

    def _send(self, plan: BatchPlan, known: Sequence[tuple[int, Tracked]], drafts: list[list[int]]) -> None:
        lengths = plan.lengths.tolist()
        if not any(lengths):
            return
        rows = zip(known, lengths, plan.chains.tokens.tolist(), plan.owners.tolist(), strict=True)
        for (row, tracked), length, tokens, owners in rows:
            if not length:
                continue
            draft = tokens[:length]
            if draft[-1] < 0:  # uniform batches are filled up: a repeated token costs a row and can do no harm
                draft = [token if token >= 0 else tracked.last for token in draft]
            drafts[row] = draft
            tracked.sent = owners
        guessed = np.count_nonzero(plan.chains.tokens != NOTHING, axis=1)
        self.counts.sent(np.minimum(plan.lengths, guessed), plan.owners, plan.path)

    def _end(self, request_id: str) -> None:
        tracked = self.requests.drop(request_id)
        if tracked.limit:
            self.speculator.end(tracked.seq)
