"""Drafts chains, one depth after the other, by rows of logits that a subclass evaluates.

Knows the texts of sequences, and how far a draft goes. Knows neither which model drafts nor what it has read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from time import perf_counter_ns

from specplug.core import EMPTY, Draft, DraftAdvice, IntArray, Likeliest, Requires, Step
from specplug.drafts.chains import num_agreeing
from specplug.drafts.confidence import bucket_of, buckets_of
from specplug.drafts.retrieval import Window
from specplug.engines.llama_cpp.context import Logits
from specplug.engines.llama_cpp.drafters.chain import Chain, likeliest_tokens, probability_of, runner_up
from specplug.engines.llama_cpp.drafters.drafted_text import DraftedText
from specplug.engines.llama_cpp.drafters.drafter_times import DrafterTimes
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.planning.constants import RETRY_TOKENS

SCORE_CONTEXT = 64
"""Tokens that the drafter reads before those on which it is scored. Chosen."""

SCORED_ROWS = RETRY_TOKENS
"""Most tokens on which it is scored: rows with logits of one pass."""


class ChainDrafter(ABC):
    """Base of drafters that draft for any number of sequences in one pass per depth.

    A draft ends where the next token no longer pays, as in SpecDec++ (arXiv 2405.19715), by measured costs instead of a
    trained threshold. A token's bucket is the probability that the drafter assigns to it, so the planner learns how far
    to trust it.
    """

    requires = Requires()
    window: Window | None = None
    """The tokens that the drafter reads of a text; None for all."""

    def __init__(
        self,
        ids: IntArray | None,
        times: DrafterTimes,
        *,
        max_tokens: int,
        max_draft: int,
        branches: int,
        end_tokens: Set[int],
    ) -> None:
        """
        ids         int32[rows of the head]: the token of each row; None if row i belongs to token i
        max_tokens  longest text of one sequence
        end_tokens  tokens after which nothing is drafted
        """
        self.buckets = buckets_of(branches)
        self.max_draft = max_draft
        self.passes = 0
        """Passes run so far in order to draft."""
        self.advice: DraftAdvice | None = None
        """Tells how far to draft."""
        self.judged_top = 0
        self.ids = ids
        self.times = times
        self._known = frozenset(ids.tolist()) if ids is not None else frozenset()
        self._max_tokens = max_tokens
        self._branches = branches
        self._end_tokens = end_tokens
        self._texts: dict[int, DraftedText] = {}

    def forget(self) -> None:
        """Return to the state after opening, except for measured costs."""
        self._texts.clear()
        self.advice = None
        self.judged_top = 0

    def use_sampler(self, seq: int, sampler: Sampler) -> None:
        """Draw draft tokens as the sequence's own tokens are drawn: same random numbers, penalties and grammar."""
        self._texts[seq].sampler = sampler

    # -- the contract of a proposer -------------------------------------------------------------------------------

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._texts[seq] = DraftedText(prompt.tolist(), len(prompt), len(prompt))

    def propose(self, seq: int, budget: int) -> Draft:
        return self.propose_batch([seq], [budget])[0]

    def propose_batch(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[Draft]:
        """One pass of the drafter per depth, for all sequences whose chains go on."""
        chains = {}
        for seq, budget in zip(seqs, budgets, strict=True):
            text = self._texts[seq]
            text.drafted, text.likeliest = [], []
            most = min(budget, self.max_draft, self._max_tokens - len(text.tokens))
            if most > 0 and self._can_draft(seq):
                draws = text.sampler.copy(self.ids) if text.sampler is not None else None
                chains[seq] = Chain(seq, budget, most, draws)
        try:
            if chains:
                self._draft(list(chains.values()))
        finally:
            for chain in chains.values():
                if chain.draws is not None:
                    chain.draws.close()
        return [chains[seq].draft() if seq in chains else EMPTY for seq in seqs]

    def observe(self, seq: int, step: Step) -> None:
        text = self._texts[seq]
        text.tokens += step.emitted
        if text.drafted and self.advice is not None:
            right = num_agreeing(text.drafted, step.emitted)
            self.advice.learn(seq, right, min(len(text.drafted), len(step.emitted), right + 1))
            text.lost_ms += (len(text.drafted) - right) * self.pass_ms(1)
        text.drafted, text.likeliest = [], []

    def end(self, seq: int) -> None:
        del self._texts[seq]

    def likeliest(self, seq: int) -> list[Likeliest]:
        return self._texts[seq].likeliest

    def knows(self, token: int) -> bool:
        return self.ids is None or token in self._known

    @property
    def drafted_ids(self) -> IntArray | None:
        """The tokens that it can draft; None for all."""
        return self.ids

    def pass_ms(self, rows: int) -> float:
        return self.times.pass_ms(rows)

    @property
    def read_token_ms(self) -> float:
        """Time to read one of many tokens, milliseconds."""
        return self.times.read_token_ms

    @property
    @abstractmethod
    def retry_ms(self) -> float:
        """Time that scoring takes, milliseconds."""

    # -- what a subclass evaluates --------------------------------------------------------------------------------

    @abstractmethod
    def _catch_up(self, seqs: Sequence[int]) -> Logits:
        """float32[n, rows of the head]: the logits after the last token of each sequence, whose text is then read."""

    @abstractmethod
    def _go_on(self, chains: Sequence[Chain]) -> Logits:
        """float32[n, rows of the head]: the logits after the last draft token of each chain, in one pass."""

    @abstractmethod
    def logits_along(self, prompt: IntArray, answer: IntArray, target_slot: int | None = None) -> Iterator[Logits]:
        """float32[rows of the head] after a prompt and each token of `answer` (int32[n]) but the last, given the tokens
        before it; each is overwritten by later passes. No sequence may run.

        target_slot  the target's slot that holds the prompt, whose cells may be copied; None where there is none
        """

    def _can_draft(self, seq: int) -> bool:
        """Whether all is known that drafting for a sequence requires."""
        return True

    # -- drafting -------------------------------------------------------------------------------------------------

    def _draft(self, chains: list[Chain]) -> None:
        """Fill the chains, one depth after the other."""
        logits = self._catch_up([chain.seq for chain in chains])
        began = perf_counter_ns()
        while True:
            self.passes += 1
            rows = len(chains)
            chains = [chain for row, chain in enumerate(chains) if self._extend(chain, logits[row], rows)]
            if not chains:
                return
            logits = self._go_on(chains)
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


def ms_since(began_ns: int) -> float:
    return (perf_counter_ns() - began_ns) / 1e6
