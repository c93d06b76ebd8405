"""A second model that drafts: chains of its own likeliest tokens, with runners-up where they are asked for.

Knows tokens and the drafter's context. Knows neither the planner nor the target, beyond what it lends: the cells of a
text that both have read, and a copy of the sampler that draws its tokens.
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
from specplug.engines.llama_cpp.step_loop import common_prefix

EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
"""Between the buckets of a guess, by the probability that the drafter itself gives it."""

FIRST_RATE = 0.8
"""Share of guesses expected to be right before any was seen."""

BEST_RATE = 0.9
"""Where not even so many right ones would pay, nothing is guessed."""

RATE_WEIGHT = 10.0
"""So many guesses that counts for; the last hundred or so matter."""

DECAY = 0.99

REFUSED = 32
"""After so many refusals the price of a guess is looked at again: it may have been high for a while only."""

CHEAPER = 0.75
"""Such a look lowers the price to this share at most: it is one pass, with less text before it than guesses have."""

LEND_FROM = 24
"""Tokens still to be read from which borrowing the target's cells costs less, where it lends them."""

TIMED_READ = 16
"""Tokens read at once from which the time per token is measured: few tokens take about as long as one."""

RISE = 0.2
"""Weight of a longer time in what reading is expected to take. A shorter one counts at once: an expectation that is too
high keeps the drafter from being asked, and so from being timed again."""

DRIFT = 0.01
"""Relative step towards a new timing of a guess. Steps of equal size track a median, which no pause moves far."""


class ModelDrafter:
    """Source: speculative decoding (arXiv 2211.17192); trimmed heads, VocabTrim (arXiv 2506.22694); stopping where the
    next guess no longer pays as in SpecDec++ (arXiv 2405.19715), by measured costs instead of a trained threshold.
    A guess's bucket is the probability that the drafter gives it, so that the planner learns how far to trust it.

    Keeps: the tokens of running sequences, and per sequence the cells of what it has read, which a prompt with the same
    beginning uses again. Requires: nothing of the target. Cost per guess: a pass of the drafter over one row.
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
        lend: Callable[[int], bytes] | None = None,
    ) -> None:
        """
        ids         int32[rows of the head]: the token of each; None where they are the tokens themselves
        slots       sequence ids 0..slots-1 are used
        max_tokens  longest text of one sequence
        end_tokens  after which nothing is guessed
        lend        the target's cells of a sequence, all but its last token; None where they are of no use here
        """
        self.buckets = tuple(
            Bucket(f"{rank} {low:g}-{high:g}", (low + high) / 2)
            for rank in ("best", "runner-up")[:branches]
            for low, high in zip((0.0, *EDGES), (*EDGES, 1.0), strict=True)
        )
        self.draft_token_ms = 0.0
        """What drafting one token costs, milliseconds."""
        self.passes = 0
        """Passes run so far in order to draft."""
        self.pays: Callable[[Sequence[int], float], bool] | None = None
        """Whether to draft on, given the buckets of the chain so far and the share of accepted draft tokens."""
        self.shared_held: list[list[int]] = [[] for _ in range(slots)]
        """Per slot the tokens in the drafter's cache."""
        self._context = context
        self._ids = ids
        self._max_tokens = max_tokens
        self._max_draft = max_draft
        self._branches = branches
        self._end_tokens = end_tokens
        self._lend = lend
        self._texts: dict[int, _Text] = {}
        self._hits, self._tested = FIRST_RATE * RATE_WEIGHT, RATE_WEIGHT
        self._refusals = 0
        self._read_token_ms = 0.0
        self._copied_token_ms = 0.0

    def warm_up(self, passes: int = 16) -> None:
        """Time passes of one row on the empty context, so that the first decision knows what a guess costs.

        The lower quartile: what disturbs makes them longer, and a price too high is found out late.
        """
        times = [self._pass_ns(place, 0) for place in range(passes)]
        self._context.drop(0)
        self.draft_token_ms = float(np.quantile(times, 0.25)) / 1e6

    def _pass_ns(self, place: int, seq: int) -> int:
        """What a guess takes: a row of no meaning, and the choice of a token."""
        began = perf_counter_ns()
        self._context.clear_batch()
        self._context.add_span([0], place, seq, wanted=True)
        self._context.decode()
        logits = self._context.logits(1)[0]
        _share(logits, int(logits.argmax()))
        return perf_counter_ns() - began

    def forget(self) -> None:
        """As if just opened, but for what a guess costs."""
        self._context.clear()
        for held in self.shared_held:
            held.clear()
        self._texts.clear()
        self._hits, self._tested = FIRST_RATE * RATE_WEIGHT, RATE_WEIGHT
        self._refusals = 0

    def close(self) -> None:
        self._context.close()
        self._context.model.close()

    def use_sampler(self, seq: int, sampler: Sampler) -> None:
        """Draw guesses for a sequence as its own tokens are drawn, with the same random numbers, penalties, grammar."""
        self._texts[seq].sampler = sampler

    # -- the proposer's contract ----------------------------------------------------------------------------------

    def begin(self, seq: int, prompt: IntArray) -> None:
        # Half of what the texts before taught, at the weight of a first guess: this one may be another kind.
        self._hits = (self._hits / self._tested + FIRST_RATE) / 2 * RATE_WEIGHT
        self._tested = RATE_WEIGHT
        self._texts[seq] = _Text(prompt.tolist(), common_prefix(self.shared_held[seq], prompt))

    def propose(self, seq: int, budget: int) -> Draft:
        text = self._texts[seq]
        most = min(budget, self._max_draft, self._max_tokens - len(text.tokens))
        text.guessed = []
        if most < 1:
            return EMPTY
        if self.pays is not None and not self.pays([], BEST_RATE):
            self._refusals += 1
            if self._refusals % REFUSED == 0:
                self._look_at_price(seq)
            return EMPTY
        logits = self._catch_up(seq, text)
        copied = text.sampler.copy(self._ids) if text.sampler is not None else None
        try:
            return self._draft(seq, text, logits, copied, budget, most)
        finally:
            if copied is not None:
                copied.close()

    def asking_ms(self, seq: int) -> float:
        """What reading the text before the last token takes, or copying its cells from the target's cache."""
        text = self._texts[seq]
        unread = self._num_unread(text)
        if self._lend is not None and unread > LEND_FROM:
            return (len(text.tokens) - 1) * self._copied_token_ms
        return (unread - 1) * self._read_token_ms

    def observe(self, seq: int, step: Step) -> None:
        text = self._texts[seq]
        for token in step.emitted:
            held = self.shared_held[seq]
            if text.read == len(text.tokens) < len(held) and held[text.read] == token:
                text.read += 1
            text.tokens.append(token)
        self._learn(text.guessed, step.emitted)
        text.guessed = []

    def end(self, seq: int) -> None:
        text = self._texts.pop(seq)
        del self.shared_held[seq][text.read :]
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
            text.guessed.append(token)
            if self._branches > 1 and len(tokens) < budget:
                second, p_second = _runner_up(logits, best)
                tokens.append(self._token(second))
                parents.append(parents[parent])
                buckets.append(len(EDGES) + 1 + bisect_right(EDGES, p_second))
            full = len(chain) >= most or len(tokens) >= budget
            if full or token in self._end_tokens or not self._guess_on(chain):
                return Draft.of(tokens, parents, buckets)
            logits = self._read(seq, [token])
            now = perf_counter_ns()
            self.draft_token_ms *= 1 + DRIFT if (now - began) / 1e6 > self.draft_token_ms else 1 - DRIFT
            began = now

    def _guess_on(self, chain: Sequence[int]) -> bool:
        return self.pays is None or self.pays(chain, self._hits / self._tested)

    def _look_at_price(self, seq: int) -> None:
        """A pass for nothing, after what is held: one faster than the known price shows that it may have fallen."""
        place = len(self.shared_held[seq])
        ms = self._pass_ns(place, seq) / 1e6
        self._context.drop(seq, place)
        if ms < self.draft_token_ms:
            self.draft_token_ms = max(ms, CHEAPER * self.draft_token_ms)

    def _learn(self, guessed: Sequence[int], emitted: Sequence[int]) -> None:
        """Count the guesses that were tested: those that came true, and the first that did not."""
        if not guessed:
            return
        hits = 0
        while hits < min(len(guessed), len(emitted)) and guessed[hits] == emitted[hits]:
            hits += 1
        tested = min(len(guessed), len(emitted), hits + 1)
        kept = DECAY**tested
        self._hits, self._tested = self._hits * kept + hits, self._tested * kept + tested

    def _token(self, row: int) -> int:
        return row if self._ids is None else int(self._ids[row])

    # -- the drafter's cache --------------------------------------------------------------------------------------

    def _catch_up(self, seq: int, text: _Text) -> Logits:
        """Read what is not yet in the cache, the last token at least; returns the logits after it."""
        held = self.shared_held[seq]
        known = text.tokens
        start = len(known) - self._num_unread(text)
        began = perf_counter_ns()
        if self._lend is not None and len(known) - start > LEND_FROM:
            self._context.drop(seq)
            held.clear()
            self._context.restore(seq, self._lend(seq))
            held += known[:-1]
            self._copied_token_ms = _followed(self._copied_token_ms, began, len(held))
        elif start < len(held):
            self._context.drop(seq, start)
            del held[start:]
        unread = known[len(held) :]
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
        """float32[rows of the head]: the logits after `tokens`, which follow what is held."""
        context, held = self._context, self.shared_held[seq]
        self.passes += 1
        for at in range(0, len(tokens), context.num_batch):
            part = tokens[at : at + context.num_batch]
            context.clear_batch()
            context.add_span(part, len(held), seq, wanted=False, last=True)
            context.decode()
            held += part
        logits: Logits = context.logits(1)[0]
        return logits


@dataclass(slots=True)
class _Text:
    """One sequence: its tokens, how many of them the drafter's cache holds, and the chain guessed last."""

    tokens: list[int]
    read: int
    sampler: Sampler | None = None
    guessed: list[int] = field(default_factory=list)


def _followed(known_ms: float, began_ns: int, tokens: int) -> float:
    """The time per token after one more measurement, of `tokens` since `began_ns`."""
    ms = (perf_counter_ns() - began_ns) / 1e6 / tokens
    return ms if not known_ms or ms < known_ms else known_ms + (ms - known_ms) * RISE


def _share(logits: Logits, row: int) -> float:
    """The probability of a row: 1 where all others are far below."""
    return float(1.0 / np.exp(logits - logits[row]).sum())


def _runner_up(logits: Logits, best: int) -> tuple[int, float]:
    """The likeliest row but one, and its probability."""
    rest = logits.copy()
    rest[best] = -np.inf
    second = int(rest.argmax())
    return second, _share(logits, second)
