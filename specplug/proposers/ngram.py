"""Prompt lookup: it drafts the tokens that followed an earlier occurrence of the last n tokens in the same text.

The text is the prompt and the output of one running sequence; other sequences and models are not used.
"""

from __future__ import annotations

from specplug.core import EMPTY, Bucket, Draft, IntArray, Requires, Step
from specplug.proposers.suffix_index import MAX_MATCH, SuffixIndex, continuation

_PRIOR_FROM_MATCH = {1: 0.23, 2: 0.52, 3: 0.63, 4: 0.73, 5: 0.75, 6: 0.77, 8: 0.82, 12: 0.9, 16: 0.93, 32: 0.96}
"""Share of draft tokens that were accepted, by effective match length: from each key to below the next."""


class Ngram:
    """Drafts a chain: the continuation of the most recent occurrence of the longest match.

    Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), as in transformers and vLLM. They
    scan the text from its start in every step and take the first occurrence. This one keeps an index and takes the last
    occurrence, measures how far a match extends beyond `max_match`, and repeats a match that overlaps the end.
    State: 24 to 48 bytes per token of a running sequence and n-gram length. Requires: nothing.
    Cost per step: 5 to 15 us, plus 0.3 us per new token and n-gram length.

    max_match  longest n-gram that is looked up, tokens
    min_match  shortest n-gram that is looked up, tokens
    max_draft  longest draft, tokens
    """

    requires = Requires()
    buckets: tuple[Bucket, ...] = tuple(Bucket(f"match {length}", prior) for length, prior in _PRIOR_FROM_MATCH.items())

    def __init__(self, *, max_match: int = 3, min_match: int = 1, max_draft: int = 10) -> None:
        if not 1 <= min_match <= max_match <= MAX_MATCH:
            raise ValueError(f"min_match {min_match}, max_match {max_match}: need 1 <= min <= max <= {MAX_MATCH}")
        if max_draft < 1:
            raise ValueError(f"max_draft is {max_draft}; use >= 1")
        self.max_draft = max_draft
        self._levels = tuple(range(min_match, max_match + 1))
        self._running: dict[int, SuffixIndex] = {}
        # The effective match length grows by one with each draft token.
        self._bucket_of = [
            sum(start <= length for start in _PRIOR_FROM_MATCH) - 1 for length in range(MAX_MATCH + max_draft)
        ]

    def begin(self, seq: int, prompt: IntArray) -> None:
        index = SuffixIndex(self._levels, capacity=len(prompt) + 256)
        index.append(prompt.tolist())
        self._running[seq] = index

    def propose(self, seq: int, budget: int) -> Draft:
        index = self._running[seq]
        length = min(budget, self.max_draft)
        if length <= 0:
            return EMPTY
        matches = index.find_longest(index.tokens, 1)
        if not matches:
            return EMPTY
        end, match = matches[0]
        return Draft.chain(continuation(index.tokens, end, length), self._bucket_of[match : match + length])

    def observe(self, seq: int, step: Step) -> None:
        self._running[seq].append(step.emitted)

    def end(self, seq: int) -> None:
        del self._running[seq]
