"""Decides for which sequences a model-based proposer is asked, and how far it drafts.

What a drafter has yet to read of a text is a price that is known before it is asked. It is compared with what drafting
is expected to save over the tokens that are likely still to come, by the experience with texts of the same kind. A
drafter that is not asked is scored now and then on tokens that were emitted without it, which is cheap.
Depends on measured costs and on the contract of `ModelBased`, not on an engine.
Source: our own.
State: a few numbers per running sequence; the experience.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

from specplug.core import IntArray, ModelBased
from specplug.drafts.trees import path_probabilities
from specplug.planning.constants import (
    BEST_RATE,
    DRAFTER_RESERVE,
    DRAFTER_SHARE,
    FEWEST_TESTED,
    FIRST_RATE,
    RATE_DECAY,
    RATE_FADING,
    RATE_TEXTS,
    RATE_WEIGHT,
    READING_MARGIN,
    READING_STEPS_ALONE,
    READING_STEPS_BESIDE,
    RETRY_TOKENS,
    TRIAL_TOKENS,
)
from specplug.planning.experience import Experience
from specplug.planning.planner import Plan, Planner

GREATEST_LOSS = -4.0
"""Smallest saving that a single step counts as: a disturbed pass must not outweigh all others."""


@dataclass(slots=True)
class _Text:
    """A running sequence.

    kind     by the experience
    right    draft tokens that agreed with the target's, decayed
    tested   draft tokens that were compared with the target's, decayed
    num_tested
             draft tokens that were compared with the target's in this text
    emitted  tokens so far
    scored   `emitted` when the drafter was last scored on it
    left     most tokens that it may still emit
    read     whether the drafter has read it
    private  whether nothing of it is kept in the experience
    """

    kind: str
    right: float
    tested: float
    num_tested: int = 0
    emitted: int = 1
    scored: int = 0
    left: int = 0
    read: bool = False
    private: bool = False

    @property
    def rate(self) -> float:
        return self.right / self.tested


class DrafterUse:
    """The use of one model-based proposer. It is the `advice` of that proposer.

    Call `places` once per step in which the proposer may be asked, and `learn_step` after it.
    """

    def __init__(
        self,
        source: ModelBased,
        planner: Planner,
        probability: Callable[[int], float],
        experience: Experience,
        clock: Callable[[], int],
    ) -> None:
        """
        probability  of acceptance, by the proposer's own bucket
        clock        nanoseconds
        """
        self.source = source
        self.experience = experience
        self.reading_ns = 0
        """Time that the proposer took to read, or to be scored, in the current step."""
        self._planner = planner
        self._probability = probability
        self._clock = clock
        self._texts: dict[int, _Text] = {}
        self._rate = FIRST_RATE
        """The rate that a new text starts from: the mean of those of earlier texts."""
        self._num_texts = 1.0
        """Weight of that mean. A text in which little was tested counts less than one."""
        self._balance_ms: float | None = None
        """Time that the proposer may still lose; None before the first step."""
        self._since_retry_ms = 0.0
        self._context = 0
        self._num_sequences = 1
        self._token_ms = 0.0
        """Time of plain decoding per token."""
        self._least_rate = 0.0
        source.advice = self

    def begin(self, seq: int, prompt: IntArray, *, private: bool = False) -> None:
        """private  keep nothing of this text in the experience"""
        kind = self.experience.kind_of(prompt)
        self._texts[seq] = _Text(kind, self._rate * RATE_WEIGHT, RATE_WEIGHT, private=private)

    def end(self, seq: int) -> None:
        text = self._texts.pop(seq)
        weight = text.num_tested / (text.num_tested + RATE_WEIGHT)
        self._num_texts = min(self._num_texts + weight, RATE_TEXTS)
        self._rate += (text.rate - self._rate) * weight / self._num_texts
        if not text.private:
            self.experience.learn_length(text.kind, text.emitted)

    def places(
        self,
        seqs: Sequence[int],
        remaining: Sequence[int],
        context: int,
        plain_ms: float,
        plan: Plan,
        *,
        may_read: bool,
    ) -> list[int]:
        """The places in `seqs` for which the proposer is asked; it reads for others, in pieces.

        remaining  most tokens that each sequence may still emit
        plain_ms   time of a plain pass
        plan       what would be verified without this proposer
        may_read   False where prompts of other sequences are being read
        """
        source = self.source
        self._context, self._num_sequences = context, len(seqs)
        self._token_ms = plain_ms / len(seqs)
        for seq, left in zip(seqs, remaining, strict=True):
            self._texts[seq].left = left
        if self._balance_ms is None:
            self._balance_ms = min(TRIAL_TOKENS * self._trial_ms(len(seqs)), DRAFTER_RESERVE * plain_ms)
        if self._balance_ms < 0:
            return []
        if not self.can_pay():
            if may_read:
                self._retry(())
            return []
        # Of several sequences those with a draft are left to the proposers that made it; a single one is not, where a
        # draft of this proposer may be better.
        alone = len(seqs) == 1
        self._least_rate = self._planner.rate(plan, context) if alone and plan.rows > 1 else 0.0
        free_ms = source.pass_ms(1)
        ready, unread = [], []
        for place, seq in enumerate(seqs):
            price_ms = source.reading_ms(seq)
            if price_ms <= free_ms:
                self._texts[seq].read = True
                if self._may_save(seq) and (alone or not len(plan.drafts[place])):
                    ready.append(place)
            elif self.reading_pays(seq, price_ms):
                unread.append(place)
        if unread and may_read:
            steps = READING_STEPS_ALONE if len(seqs) == 1 else READING_STEPS_BESIDE
            self._timed(lambda: source.read([seqs[place] for place in unread], steps * plain_ms))
            ready += [
                place for place in unread if source.reading_ms(seqs[place]) <= free_ms and self._may_save(seqs[place])
            ]
        if not ready and not unread and may_read:
            self._retry(seqs)
        return sorted(ready)

    def learn_step(self, seq: int, tokens: int, plain_ms: float, saved_ms: float | None) -> None:
        """A sequence has emitted so many tokens.

        plain_ms  time that plain decoding takes for them
        saved_ms  time that drafting saved in this step, less the time it took; None where the proposer was not asked
        """
        text = self._texts[seq]
        text.emitted += tokens
        if saved_ms is None and text.read:  # others did better, or it is in a cooldown
            saved_ms = 0.0
            kept = max(RATE_FADING, FEWEST_TESTED / text.tested)
            text.right, text.tested = text.right * kept, text.tested * kept
        if saved_ms is not None:
            self._charge(-saved_ms)
            self._learn_saving(text, max(saved_ms / plain_ms, GREATEST_LOSS), tokens)

    def learn_pass(self, plain_ms: float) -> None:
        """A step was made in which plain decoding takes so many milliseconds: the drafter may cost a share of it."""
        self._since_retry_ms += plain_ms
        self._charge(-DRAFTER_SHARE * plain_ms)
        if self._balance_ms is not None:
            self._balance_ms = min(self._balance_ms, DRAFTER_RESERVE * plain_ms)

    def can_pay(self, context: int | None = None) -> bool:
        """Whether a draft of mostly right tokens would save time with the current number of sequences.

        context  tokens in the cache of each; the current number where None
        """
        return self._first_pays(BEST_RATE, 0.0, context)

    def _may_save(self, seq: int) -> bool:
        """Whether a draft for a sequence may save time, and more than those of the other proposers, if as many of its
        tokens are right as can be hoped for after those that were tested."""
        text = self._texts[seq]
        return self._first_pays(min(BEST_RATE, text.rate + 1 / sqrt(text.tested)), self._least_rate)

    def _first_pays(self, rate: float, least_rate: float, context: int | None = None) -> bool:
        rows = self._num_sequences
        draft_token_ms = self.source.pass_ms(rows) / rows
        context = self._context if context is None else context
        return self._planner.another_pays([], rate, draft_token_ms, context, rows, least_rate)

    # -- the advice for the proposer ------------------------------------------------------------------------------

    def another_pays(self, seq: int, chain: Sequence[int], rows: int) -> bool:
        path = path_probabilities(range(-1, len(chain) - 1), [self._probability(bucket) for bucket in chain])
        draft_token_ms = self.source.pass_ms(rows) / rows
        rate = self._texts[seq].rate
        return self._planner.another_pays(
            path, rate, draft_token_ms, self._context, self._num_sequences, self._least_rate
        )

    def reading_pays(self, seq: int, price_ms: float) -> bool:
        """A kind of text without experience is tried as long as the balance covers the price."""
        text = self._texts[seq]
        prior = self._saved_share(FIRST_RATE, self.source.pass_ms(self._num_sequences))
        share = self.experience.saving(text.kind, prior)
        if self._balance_ms is not None and self._balance_ms >= price_ms and not self.experience.knows(text.kind):
            share = max(share, prior)
        rest = self.experience.remaining(text.kind, text.emitted, text.left)
        return share * self._token_ms * rest >= READING_MARGIN * price_ms

    def saved_ms(self, rate: float, draft_ms: float) -> float:
        n = self._num_sequences
        plain_ms = self._planner.cost.at(self._context)[min(n, self._planner.cost.limit) - 1]
        return self._planner.saved_share(rate, draft_ms, self._context, n) * plain_ms / n

    def expect(self, rate: float) -> None:
        self._rate, self._num_texts = rate, 1.0
        for text in self._texts.values():
            text.right, text.tested = rate * RATE_WEIGHT, RATE_WEIGHT

    def learn(self, seq: int, right: int, tested: int) -> None:
        text = self._texts[seq]
        kept = RATE_DECAY**tested
        text.right, text.tested = text.right * kept + right, text.tested * kept + tested
        text.num_tested += tested

    # -- what asking is worth -------------------------------------------------------------------------------------

    def _trial_ms(self, sequences: int) -> float:
        """Time that a draft token costs which is wrong: that of drafting it, and that of its row."""
        ms = self._planner.cost.at(self._context)
        rows = min(sequences, len(ms) - 1)
        return self.source.pass_ms(1) + ms[rows] - ms[rows - 1]

    def _saved_share(self, rate: float, draft_ms: float) -> float:
        return self._planner.saved_share(rate, draft_ms, self._context, self._num_sequences)

    def _retry(self, seqs: Sequence[int]) -> None:
        """Find out whether the proposer should be asked again, rarely enough that it costs a small share of the time.

        Without `seqs` its passes are timed, else it is scored on the longest text on which it was not scored lately.
        """
        if self._since_retry_ms * DRAFTER_SHARE < self.source.retry_ms:
            return
        if not seqs:
            self._since_retry_ms = 0.0
            self._timed(self.source.time_pass)
            return
        seq = max(seqs, key=lambda one: self._texts[one].emitted - self._texts[one].scored)
        text = self._texts[seq]
        if text.emitted - text.scored < RETRY_TOKENS:
            return
        self._since_retry_ms = 0.0
        text.scored = text.emitted
        draft_ms = self.source.pass_ms(self._num_sequences)  # of what is scored: afterwards it may draft otherwise
        scores: list[tuple[int, int]] = []
        self._timed(lambda: scores.append(self.source.score(seq)))
        ((right, compared),) = scores
        if not compared:
            return
        self.learn(seq, right, compared)
        self._learn_saving(text, self._saved_share((right + 0.5) / (compared + 1), draft_ms), compared)

    def _learn_saving(self, text: _Text, share: float, tokens: int) -> None:
        if not text.private:
            self.experience.learn_saving(text.kind, share, tokens)

    def _timed(self, work: Callable[[], object]) -> None:
        began_ns = self._clock()
        work()
        taken_ns = self._clock() - began_ns
        self.reading_ns += taken_ns
        self._charge(taken_ns / 1e6)

    def _charge(self, ms: float) -> None:
        if self._balance_ms is not None:
            self._balance_ms -= ms
