"""Turns one pass of the target over a batch into the drafts for the next pass.

It follows the layout of vLLM's runner: rows move between steps, tokens are in one array, and long prompts are processed
in chunks. It imports no vllm, so that its cost can be measured and its edge cases tested without an engine.
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
from specplug.engines.vllm.draft_counters import DraftCounters
from specplug.engines.vllm.request_table import RequestTable, TrackedRequest, continues, new_tokens, prompt_of
from specplug.planning.batch_speculator import BatchPlan, BatchSpeculator
from specplug.planning.cost import BatchCost

MAX_PROMPT_TOKENS = 8192
"""The most tokens of new prompts that the proposers receive in one step; the first prompt is always passed in full.
Reading 8192 tokens takes 20 ms, and every running request waits for it."""

TopIds = Callable[[IntArray, int], IntArray]
"""(rows of the pass int32[r], k) -> int32[r, k], the most likely ids after each row."""


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One pass of the target, after sampling, as vLLM's runner describes it.

    request_ids  by row
    sampled      by row, the new tokens; empty while a prompt is processed in chunks
    num_drafts   by row, the draft tokens that were verified; None if there were none at all
    num_tokens   int[>= n]  by row, tokens of prompt and answer, including the new ones
    num_prompt   int[>= n]  by row, tokens of the prompt
    token_ids    int[>= n, >= max tokens]
    num_read     tokens that the target processed, including prompts
    live         every request that is not finished, including those that wait
    params       returns a request's sampling parameters by its id
    top_ids      None if the pass was not asked for them
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
    """Drafts for vLLM's batch, one step at a time."""

    def __init__(
        self,
        speculator: BatchSpeculator,
        cost: BatchCost,
        requests: RequestTable,
        *,
        adaptive: bool = True,
        clock: Callable[[], int] = perf_counter_ns,
    ) -> None:
        """adaptive  correct the cost curves by the time of real passes; off where several ranks must draft alike"""
        self.speculator = speculator
        self.cost = cost
        self.counters = DraftCounters(speculator.names)
        self.requests = requests
        self._adaptive = adaptive
        self._clock = clock
        self._returned = 0
        self._last_ids: list[str] = []
        self._context = 0

    @property
    def wants_topk(self) -> int:
        """How many top ids per row the current pass should provide; 0 for none."""
        return self.speculator.wants_topk

    def step(self, done: Pass) -> list[list[int]]:
        """Draft tokens by row, at most k for each row, and often none."""
        began = self._clock()
        n = len(done.sampled)
        timed = self._record_pass(done, n, began)
        for request_id in self.requests.finished(done.live):
            self._end(request_id)
        drafts: list[list[int]] = [[] for _ in range(n)]
        if self.speculator.should_draft(n if timed else 0):
            self._draft(done, n, drafts)
        self._last_ids = list(done.request_ids)
        self._returned = self._clock()
        self.counters.draft_ns += self._returned - began
        return drafts

    def _record_pass(self, done: Pass, n: int, now: int) -> bool:
        """Count the pass, and learn its cost if it could be timed. Returns whether it could.

        It could if it processed no prompt and had the same requests as the pass before it: then the time since the last
        step was spent on this pass alone.
        """
        rows = n + (sum(done.num_drafts) if done.num_drafts is not None else 0)
        if done.num_read != rows:
            return False
        self.counters.steps += 1
        self.counters.rows += rows
        if self._last_ids != done.request_ids:
            return False
        if self._adaptive:
            self.cost.observe(n, rows, self._context, (now - self._returned) / 1e6)
        return True

    def _draft(self, done: Pass, n: int, drafts: list[list[int]]) -> None:
        """Fill `drafts` by row, after the proposers have received all new tokens."""
        lengths: list[int] = done.num_tokens[:n].tolist()
        self._context = sum(lengths) // max(1, n)
        to_observe: list[tuple[int, TrackedRequest]] = []
        to_draft: list[tuple[int, TrackedRequest]] = []
        prompt_tokens = 0
        for row, request_id in enumerate(done.request_ids[:n]):
            if not done.sampled[row]:
                continue
            tracked = self.requests.get(request_id)
            if tracked is not None and not tracked.max_draft:
                continue
            line, length = done.token_ids[row], lengths[row]
            if tracked is not None and not continues(tracked, line, length):
                self._end(request_id)
                tracked = None
            if tracked is None:
                if prompt_tokens and prompt_tokens + length > MAX_PROMPT_TOKENS:
                    continue
                prompt_tokens += length
                tracked = self.requests.add(request_id, int(done.num_prompt[row]), done.params(request_id))
                if not tracked.max_draft:
                    continue
                self.speculator.begin(tracked.seq, prompt_of(line, length), tracked.options)
                new_tokens(tracked, line, length)
            elif length > tracked.num_seen:
                to_observe.append((row, tracked))
            to_draft.append((row, tracked))
        if to_observe:
            self._observe(done, to_observe, lengths)
        budgets = int_array([min(one.max_draft, one.max_length - lengths[row] - 1) for row, one in to_draft])
        plan = self.speculator.plan([one.seq for _, one in to_draft], n, self._context, np.maximum(budgets, 0))
        self._send(plan, to_draft, drafts)

    def _observe(self, done: Pass, rows: Sequence[tuple[int, TrackedRequest]], lengths: Sequence[int]) -> None:
        """Pass the new tokens of these requests to the proposers."""
        seqs: list[int] = []
        emitted: list[list[int]] = []
        before: list[int] = []
        for row, tracked in rows:
            before.append(tracked.last_token)
            tokens = new_tokens(tracked, done.token_ids[row], lengths[row])
            before += tokens[:-1]
            seqs.append(tracked.seq)
            emitted.append(tokens)
        after = [token for tokens in emitted for token in tokens]
        if done.num_drafts is not None:
            self._count_accepted(done, rows)
        began = self._clock()
        read, topk = self._top_ids(done, rows)
        steps = ChainSteps(seqs, emitted, int_array(before), int_array(after), read, topk)
        self.speculator.observe(steps, self._clock() - began if topk is not None else 0)

    def _count_accepted(self, done: Pass, rows: Sequence[tuple[int, TrackedRequest]]) -> None:
        assert done.num_drafts is not None
        for row, tracked in rows:
            accepted = len(done.sampled[row]) - 1
            if accepted and done.num_drafts[row]:
                self.counters.add_accepted(tracked.draft_owners[:accepted])

    def _top_ids(self, done: Pass, rows: Sequence[tuple[int, TrackedRequest]]) -> tuple[IntArray, IntArray | None]:
        """The tokens that the pass processed on the accepted path, and the top ids after each."""
        k = self.speculator.wants_topk
        if done.top_ids is None or not k:
            return int_array([]), None
        n = len(done.sampled)
        heights = np.ones(n, dtype=np.int64) if done.num_drafts is None else np.asarray(done.num_drafts[:n]) + 1
        starts = (np.cumsum(heights) - heights).tolist()
        pass_rows: list[int] = []
        read: list[int] = []
        for row, _ in rows:
            count = len(done.sampled[row])
            end = int(done.num_tokens[row]) - 1
            pass_rows += range(starts[row], starts[row] + count)
            read += done.token_ids[row, end - count : end].tolist()
        return int_array(read), done.top_ids(int_array(pass_rows), k)

    def _send(self, plan: BatchPlan, rows: Sequence[tuple[int, TrackedRequest]], drafts: list[list[int]]) -> None:
        """Write the planned chains into `drafts`, and count them."""
        lengths = plan.lengths.tolist()
        if not any(lengths):
            return
        planned = zip(rows, lengths, plan.chains.tokens.tolist(), plan.owners.tolist(), strict=True)
        for (row, tracked), length, tokens, owners in planned:
            if not length:
                continue
            draft = tokens[:length]
            if draft[-1] < 0:  # a uniform batch is filled up: a repeated token costs a row and does no harm
                draft = [token if token >= 0 else tracked.last_token for token in draft]
            drafts[row] = draft
            tracked.draft_owners = owners
        proposed = np.count_nonzero(plan.chains.tokens != NOTHING, axis=1)
        self.counters.add_drafts(np.minimum(plan.lengths, proposed), plan.owners, plan.path)

    def _end(self, request_id: str) -> None:
        tracked = self.requests.drop(request_id)
        if tracked.max_draft:
            self.speculator.end(tracked.seq)
