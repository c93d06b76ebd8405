"""A second model that drafts: chains of its own likeliest tokens, with runners-up where the profile asks for them.

Depends neither on the planner nor on the target, except that it may copy the target's KV cells of a text that both have
read, and draw with a copy of the target's sampler.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from time import perf_counter_ns

import numpy as np

from specplug.core import EMPTY, ROOT, Bucket, Draft, IntArray, Requires, Step
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.sampling import Sampler, SamplerCopy
from specplug.engines.llama_cpp.slots import common_prefix

EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
"""The boundaries between buckets: the probability that the drafter assigns to the token it drafts."""

FIRST_RATE = 0.8
"""The share of draft tokens expected to be accepted before any was verified."""

BEST_RATE = 0.9
"""If even this share of accepted tokens would not pay, nothing is drafted."""

RATE_WEIGHT = 10.0
"""The number of verified draft tokens that FIRST_RATE counts for."""

DECAY = 0.99
"""Factor on the counts per verified draft token, so that about the last hundred matter."""

PRICE_CHECK_INTERVAL = 32
"""Declined steps after which the cost of a draft token is measured again: it may have been high only for a while."""

LEAST_PRICE_RATIO = 0.75
"""Such a measurement cannot lower the cost below this share of it: it is one pass, after a shorter text than usual."""

COPY_FROM = 24
"""Unread tokens from which copying the target's cells costs less than reading, if they can be copied."""

TIMED_READ = 16
"""Tokens read at once from which the time per token is measured; fewer take about as long as one."""

RISE = 0.2
"""Weight of a longer time in the expected time per token read. A shorter time replaces it at once: an expectation that
is too high keeps the drafter from being asked, and so from being timed again."""

READ_COST_DECAY = 0.9
"""Factor on these times per text: a disturbed measurement must not keep the drafter from being asked for good."""

DRIFT = 0.01
"""Relative step towards a new timing of a draft token. Steps of equal size track a median, which no pause moves far."""


class ModelDrafter:
    """Drafts with a model of its own.

    Source: speculative decoding (arXiv 2211.17192); trimmed heads, VocabTrim (arXiv 2506.22694). A draft ends where the
    next token no longer pays, as in SpecDec++ (arXiv 2405.19715), by measured costs instead of a trained threshold.
    A token's bucket is the probability that the drafter assigns to it, so the planner learns how far to trust it.
    State: the tokens of running sequences, and per slot the KV cells of the tokens that the drafter has read, which a
    prompt with the same beginning uses again.
    Requires: nothing of the target.
    Cost per draft token: a pass of the drafter over one row.
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
        target_cells: Callable[[int], bytes] | None = None,
    ) -> None:
        """
        ids           int32[rows of the head]: the token of each row; None if row i belongs to token i
        slots         sequence ids 0..slots-1 are used
        max_tokens    longest text of one sequence
        end_tokens    tokens after which nothing is drafted
        target_cells  returns the target's cells of a sequence, without its last token; None if they do not fit
        """
        self.buckets = tuple(
            Bucket(f"{rank} {low:g}-{high:g}", (low + high) / 2)
            for rank in ("best", "runner-up")[:branches]
            for low, high in zip((0.0, *EDGES), (*EDGES, 1.0), strict=True)
        )
        self.draft_token_ms = 0.0
        """Time to draft one token, milliseconds."""
        self.passes = 0
        """Passes run so far in order to draft."""
        self.pays: Callable[[Sequence[int], float], bool] | None = None
        """Whether to draft on, given the buckets of the chain so far and the share of accepted draft tokens."""
        self.shared_cached: list[list[int]] = [[] for _ in range(slots)]
        """The cached tokens of the drafter, per slot."""
        self._context = context
        self._ids = ids
        self._max_tokens = max_tokens
        self._max_draft = max_draft
        self._branches = branches
        self._end_tokens = end_tokens
        self._target_cells = target_cells
        self._texts: dict[int, _Text] = {}
        self._hits, self._tested = FIRST_RATE * RATE_WEIGHT, RATE_WEIGHT
        self._declined = 0
        self._read_token_ms = 0.0
        self._copied_token_ms = 0.0

    def warm_up(self, passes: int = 16) -> None:
        """Time passes of one row on the empty context, so that the first decision knows what a draft token costs.

        It takes the lower quartile: disturbances make passes longer, and a cost that is too high is corrected late.
        """
        times = [self._pass_ns(place, 0) for place in range(passes)]
        self._context.drop(0)
        self.draft_token_ms = float(np.quantile(times, 0.25)) / 1e6

    def _pass_ns(self, place: int, seq: int) -> int:
        """Time of one draft token: a pass over one arbitrary row, and the choice of a token."""
        began = perf_counter_ns()
        self._context.clear_batch()
        self._context.add_span([0], place, seq, wanted=True)
        self._context.decode()
        logits = self._context.logits(1)[0]
        _share(logits, int(logits.argmax()))
        return perf_counter_ns() - began

    def forget(self) -> None:
        """Return to the state after opening, except for the measured cost of a draft token."""
        self._context.clear()
        for cached in self.shared_cached:
            cached.clear()
        self._texts.clear()
        self._hits, self._tested = FIRST_RATE * RATE_WEIGHT, RATE_WEIGHT
        self._declined = 0
        self._read_token_ms = self._copied_token_ms = 0.0

    def close(self) -> None:
        self._context.close()
        self._context.model.close()

    def use_sampler(self, seq: int, sampler: Sampler) -> None:
        """Draw draft tokens as the sequence's own tokens are drawn: same random numbers, penalties and grammar."""
        self._texts[seq].sampler = sampler

    # -- the proposer's contract ----------------------------------------------------------------------------------

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._read_token_ms *= READ_COST_DECAY
        self._copied_token_ms *= READ_COST_DECAY
        # The mean of FIRST_RATE and the rate of earlier texts, with little weight: this text may be of another kind.
        self._hits = (self._hits / self._tested + FIRST_RATE) / 2 * RATE_WEIGHT
        self._tested = RATE_WEIGHT
        self._texts[seq] = _Text(prompt.tolist(), common_prefix(self.shared_cached[seq], prompt))

    def propose(self, seq: int, budget: int) -> Draft:
        text = self._texts[seq]
        most = min(budget, self._max_draft, self._max_tokens - len(text.tokens))
        text.drafted = []
        if most < 1:
            return EMPTY
        if self.pays is not None and not self.pays([], BEST_RATE):
            self._declined += 1
            if self._declined % PRICE_CHECK_INTERVAL == 0:
                self._check_price(seq)
            return EMPTY
        logits = self._catch_up(seq, text)
        copied = text.sampler.copy(self._ids) if text.sampler is not None else None
        try:
            return self._draft(seq, text, logits, copied, budget, most)
        finally:
            if copied is not None:
                copied.close()

    def asking_ms(self, seq: int) -> float:
        """The time to read the text before the last token, or to copy its cells from the target's cache."""
        text = self._texts[seq]
        unread = self._num_unread(text)
        if self._target_cells is not None and unread > COPY_FROM:
            return (len(text.tokens) - 1) * self._copied_token_ms
        return (unread - 1) * self._read_token_ms

    def observe(self, seq: int, step: Step) -> None:
        text = self._texts[seq]
        for token in step.emitted:
            cached = self.shared_cached[seq]
            if text.read == len(text.tokens) < len(cached) and cached[text.read] == token:
                text.read += 1
            text.tokens.append(token)
        self._learn(text.drafted, step.emitted)
        text.drafted = []

    def end(self, seq: int) -> None:
        text = self._texts.pop(seq)
        del self.shared_cached[seq][text.read :]
        self._context.drop(seq, text.read)

    # -- drafting -------------------------------------------------------------------------------------------------

    def _draft(self, seq: int, text: _Text, logits: Logits, draws: SamplerCopy | None, budget: int, most: int) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        buckets: list[int] = []
        chain: list[int] = []
        parent = ROOT
        began = perf_counter_ns()
        while True:
            best = int(logits.argmax()) if draws is None else draws.draw(logits)
            if best is None:
                return Draft.of(tokens, parents, buckets)
            token = self._token(best)
            parents.append(parent)
            parent = len(tokens)
            tokens.append(token)
            buckets.append(bisect_right(EDGES, _share(logits, best)))
            chain.append(buckets[-1])
            text.drafted.append(token)
            if self._branches > 1 and len(tokens) < budget:
                second, p_second = _runner_up(logits, best)
                tokens.append(self._token(second))
                parents.append(parents[parent])
                buckets.append(len(EDGES) + 1 + bisect_right(EDGES, p_second))
            full = len(chain) >= most or len(tokens) >= budget
            if full or token in self._end_tokens or not self._pays_on(chain):
                return Draft.of(tokens, parents, buckets)
            logits = self._read(seq, [token])
            now = perf_counter_ns()
            self.draft_token_ms *= 1 + DRIFT if (now - began) / 1e6 > self.draft_token_ms else 1 - DRIFT
            began = now

    def _pays_on(self, chain: Sequence[int]) -> bool:
        return self.pays is None or self.pays(chain, self._hits / self._tested)

    def _check_price(self, seq: int) -> None:
        """Time a pass after the cached tokens: if it is faster than the known cost, the cost may have fallen."""
        place = len(self.shared_cached[seq])
        ms = self._pass_ns(place, seq) / 1e6
        self._context.drop(seq, place)
        if ms < self.draft_token_ms:
            self.draft_token_ms = max(ms, LEAST_PRICE_RATIO * self.draft_token_ms)

    def _learn(self, drafted: Sequence[int], emitted: Sequence[int]) -> None:
        """Count the draft tokens that were verified: the accepted ones, and the first rejected one."""
        if not drafted:
            return
        hits = 0
        while hits < min(len(drafted), len(emitted)) and drafted[hits] == emitted[hits]:
            hits += 1
        tested = min(len(drafted), len(emitted), hits + 1)
        kept = DECAY**tested
        self._hits, self._tested = self._hits * kept + hits, self._tested * kept + tested

    def _token(self, row: int) -> int:
        return row if self._ids is None else int(self._ids[row])

    # -- the drafter's cache --------------------------------------------------------------------------------------

    def _catch_up(self, seq: int, text: _Text) -> Logits:
        """Read the tokens that are not yet in the cache, the last one at least; returns the logits after it."""
        cached = self.shared_cached[seq]
        known = text.tokens
        start = len(known) - self._num_unread(text)
        began = perf_counter_ns()
        if self._target_cells is not None and len(known) - start > COPY_FROM:
            self._context.drop(seq)
            cached.clear()
            self._context.restore(seq, self._target_cells(seq))
            cached += known[:-1]
            self._copied_token_ms = _followed(self._copied_token_ms, began, len(cached))
        elif start < len(cached):
            self._context.drop(seq, start)
            del cached[start:]
        unread = known[len(cached) :]
        began = perf_counter_ns()
        logits = self._read(seq, unread)
        if len(unread) >= TIMED_READ:
            self._read_token_ms = _followed(self._read_token_ms, began, len(unread))
        text.read = len(known)
        return logits

    def _num_unread(self, text: _Text) -> int:
        """Tokens that are not in the cache, or whose logits are needed: the last one at least."""
        return max(len(text.tokens) - text.read, 1)

    def _read(self, seq: int, tokens: Sequence[int]) -> Logits:
        """float32[rows of the head]: the logits after `tokens`, which follow the cached tokens."""
        context, cached = self._context, self.shared_cached[seq]
        self.passes += 1
        for at in range(0, len(tokens), context.num_batch):
            part = tokens[at : at + context.num_batch]
            context.clear_batch()
            context.add_span(part, len(cached), seq, wanted=False, last=True)
            context.decode()
            cached += part
        logits: Logits = context.logits(1)[0]
        return logits


@dataclass(slots=True)
class _Text:
    """One sequence: its tokens, how many of them the drafter has read, and the chain that it drafted last."""

    tokens: list[int]
    read: int
    sampler: Sampler | None = None
    drafted: list[int] = field(default_factory=list)


def _followed(known_ms: float, began_ns: int, tokens: int) -> float:
    """The expected time per token after one more measurement: of `tokens`, since `began_ns`."""
    ms = (perf_counter_ns() - began_ns) / 1e6 / tokens
    return ms if not known_ms or ms < known_ms else known_ms + (ms - known_ms) * RISE


def _share(logits: Logits, row: int) -> float:
    """The probability of a row."""
    return float(1.0 / np.exp(logits - logits[row]).sum())


def _runner_up(logits: Logits, best: int) -> tuple[int, float]:
    """The second likeliest row, and its probability."""
    rest = logits.copy()
    rest[best] = -np.inf
    second = int(rest.argmax())
    return second, _share(logits, second)
