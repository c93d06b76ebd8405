"""Suffix decoding: it drafts the tokens that followed the end of the text where that occurred before.

It searches the tokens of the running sequence itself and of finished answers, and uses no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import EMPTY, ROOT, Bucket, Draft, IntArray, Requires, Step, int_array
from specplug.drafts.chains import Chains, ChainSteps
from specplug.proposers.suffix_index import LEVELS, MAX_MATCH, SuffixIndex, continuation

_PRIORS: tuple[tuple[str, dict[str, dict[int, float]]], ...] = (
    ("local", {
        "one": {1: 0.33, 2: 0.52, 3: 0.64, 4: 0.75, 6: 0.79, 8: 0.84, 12: 0.90, 16: 0.93, 32: 0.96},
        "two": {1: 0.42, 2: 0.74, 3: 0.80, 5: 0.82, 8: 0.92, 16: 0.96},
        "many": {1: 0.70, 2: 0.88, 3: 0.92, 5: 0.95, 8: 0.98},
        "most": {1: 0.38, 2: 0.52, 3: 0.50, 5: 0.52},
        "some": {1: 0.14, 2: 0.21, 5: 0.26},
        "few": {1: 0.06, 2: 0.08, 3: 0.10},
    }),
    ("shared", {
        "one": {2: 0.18, 3: 0.22, 4: 0.32, 6: 0.42, 8: 0.50, 12: 0.60, 16: 0.75, 32: 0.85},
        "two": {2: 0.27, 3: 0.40, 5: 0.45, 8: 0.88, 16: 0.95},
        "many": {2: 0.55, 3: 0.50, 5: 0.55, 8: 0.95},
        "most": {2: 0.24, 3: 0.25, 5: 0.55},
        "some": {2: 0.09, 3: 0.11, 5: 0.22},
        "few": {2: 0.03, 3: 0.05},
    }),
)  # fmt: skip
"""Share of draft tokens that were accepted, by three properties.

Store: `local` is the text itself, `shared` are earlier answers.
Support is the number of occurrences that continue with this token. `one`, `two` and `many`: all of 1, 2 or more
occurrences; `most`: more than half of them; `some`: a third or more; `few`: fewer.
Effective match length, from each key to below the next: the match at the root plus one per draft token before this one.
"""

LOCAL, SHARED = range(2)
"""The stores: the text itself, and earlier answers."""

MOST = 3
"""The index of the support `most`; `some` and `few` follow."""
_SOME, _FEW = MOST + 1, MOST + 2

_SHARED_LEVELS = LEVELS[1:]
"""N-gram lengths of the shared store, without 1: a single equal token in another answer predicts next to nothing."""

CONTEXT_TOKENS = LEVELS[-1]
"""Tokens at the end of a prompt that are stored with its answer: with one chat template they match from the start."""

_SEPARATOR = -1
"""Separates two answers in the shared store."""

_Candidate = tuple[int, int, list[int]]
"""(match length, LOCAL or SHARED, the tokens that followed)"""


@dataclass(slots=True)
class _Running:
    index: SuffixIndex
    num_prompt: int


class Suffix:
    """Drafts a tree: the merged continuations of the most recent occurrences of the longest match, in two stores.

    Source: SuffixDecoding (arXiv 2411.04975) for the two stores, the counts and the least probability of a path;
    SAM-Decoding (arXiv 2411.10666) for the longest match. Both rank draft tokens by counts alone. This one ranks them
    by how often tokens of the same store, support and match length were accepted, and these are its buckets. Draft
    length grows with match length through their priors, without a rule of its own.
    State: 150 to 210 bytes per token of a running sequence; `shared_index`: 7 MiB if its 65,536 tokens are full, the
    oldest answers are dropped first. Requires: nothing.
    Cost per step: 3 us without a match, 15 us for a chain, 30 us for a tree; 3 us per new token of the text, and once
    2 us per token of a finished answer, at the first look-up after its end.

    max_draft      longest path of a draft, tokens
    min_prob       least probability of a path, by the priors
    occurrences    most occurrences that are considered per store, the most recent first
    shared_tokens  bound on the tokens of finished answers; 0 stores none
    """

    requires = Requires()
    buckets: tuple[Bucket, ...] = tuple(
        Bucket(f"{store} {support} {length}", prior)
        for store, supports in _PRIORS
        for support, priors in supports.items()
        for length, prior in priors.items()
    )

    def __init__(
        self, *, max_draft: int = 32, min_prob: float = 0.05, occurrences: int = 8, shared_tokens: int = 65536
    ) -> None:
        if max_draft < 1 or occurrences < 1 or shared_tokens < 0 or not 0.0 <= min_prob <= 1.0:
            raise ValueError(
                f"max_draft {max_draft}, occurrences {occurrences}, shared_tokens {shared_tokens}, min_prob "
                f"{min_prob}: need >= 1, >= 1, >= 0 and a probability"
            )
        self.max_draft = max_draft
        self.min_prob = min_prob
        self.occurrences = occurrences
        self.shared_tokens = shared_tokens
        self.shared_index = SuffixIndex(_SHARED_LEVELS, capacity=shared_tokens)
        self.shared_lengths: deque[int] = deque()
        self._running: dict[int, _Running] = {}
        self.bucket_rows = _bucket_rows(MAX_MATCH + max_draft)
        """[store][support][match length plus depth] -> bucket."""
        self._priors = [bucket.prior for bucket in self.buckets]

    def begin(self, seq: int, prompt: IntArray) -> None:
        index = SuffixIndex(capacity=len(prompt) + 256)
        index.append(prompt.tolist())
        self._running[seq] = _Running(index, len(prompt))

    def propose(self, seq: int, budget: int) -> Draft:
        index = self._running[seq].index
        if budget <= 0:
            return EMPTY
        candidates = self._candidates(index, min(budget, self.max_draft))
        if not candidates:
            return EMPTY
        first = candidates[0][2]
        if all(candidate[2] == first for candidate in candidates):
            return self._chain(candidates)
        return self._tree(candidates, budget)

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        """The chain that takes, token by token, the most likely continuation by the priors."""
        tokens: list[list[int]] = []
        buckets: list[list[int]] = []
        for seq in seqs:
            candidates = self._candidates(self._running[seq].index, min(k, self.max_draft))
            tokens.append([])
            buckets.append([])
            path_prob = 1.0
            for depth in range(k if candidates else 0):
                best = max(self._children(candidates, depth), key=self._prior, default=None)
                if best is None:
                    break
                token, bucket, candidates = best
                path_prob *= self._priors[bucket]
                if path_prob < self.min_prob:
                    break
                tokens[-1].append(token)
                buckets[-1].append(bucket)
        return Chains.of(tokens, buckets, k)

    def observe(self, seq: int, step: Step) -> None:
        self._running[seq].index.append(step.emitted)

    def observe_chains(self, steps: ChainSteps) -> None:
        for seq, emitted in zip(steps.seqs, steps.emitted, strict=True):
            self._running[seq].index.append(emitted)

    def end(self, seq: int) -> None:
        run = self._running.pop(seq)
        if self.shared_tokens > 1:
            answer = run.index.tokens[max(0, run.num_prompt - CONTEXT_TOKENS) :]
            self._remember([*answer[1 - self.shared_tokens :], _SEPARATOR])

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """tokens int32[n]: the stored answers, each ending with -1; lengths int32[m]: the number of tokens of each."""
        return {"tokens": int_array(self.shared_index.tokens), "lengths": int_array(list(self.shared_lengths))}

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        tokens, lengths = state["tokens"], state["lengths"]
        if tokens.dtype != np.int32 or lengths.dtype != np.int32 or tokens.ndim != 1 or lengths.ndim != 1:
            raise ValueError("the state of a suffix proposer must be two int32 vectors, tokens and lengths")
        if (lengths < 1).any() or lengths.sum() != len(tokens):
            raise ValueError(f"{len(tokens)} tokens, but the lengths of their answers sum to {lengths.sum()}")
        self.shared_index = SuffixIndex(_SHARED_LEVELS, capacity=self.shared_tokens)
        self.shared_lengths.clear()
        for answer in np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []:
            if len(answer) <= self.shared_tokens:
                self._remember(answer.tolist())

    def _remember(self, answer: list[int]) -> None:
        while self.shared_lengths and len(self.shared_index.tokens) + len(answer) > self.shared_tokens:
            self.shared_index.drop(self.shared_lengths.popleft())
        self.shared_index.append(answer)
        self.shared_lengths.append(len(answer))

    def _candidates(self, index: SuffixIndex, length: int) -> list[_Candidate]:
        """Continuations of up to `length` tokens each: those of the text itself first, the most recent first."""
        context, shared = index.tokens, self.shared_index.tokens
        candidates: list[_Candidate] = []
        for end, match in index.find_longest(context, self.occurrences):
            candidates.append((match, LOCAL, continuation(context, end, length)))
        for end, match in self.shared_index.find_longest(context, self.occurrences) if shared else ():
            followed = shared[end : end + length]
            if _SEPARATOR in followed:
                followed = followed[: followed.index(_SEPARATOR)]
            if followed:
                candidates.append((match, SHARED, followed))
        return candidates

    def _chain(self, candidates: list[_Candidate]) -> Draft:
        """The draft of continuations that are all equal."""
        store, followed = candidates[0][1:]
        matches = [candidate[0] for candidate in candidates if candidate[1] == store]
        support, match = _support(len(matches), len(matches)), max(matches)
        buckets = self.bucket_rows[store][support][match : match + len(followed)]
        path_prob = 1.0
        for n, bucket in enumerate(buckets):
            path_prob *= self._priors[bucket]
            if path_prob < self.min_prob:
                return Draft.chain(followed[:n], buckets[:n])
        return Draft.chain(followed, buckets)

    def _tree(self, candidates: list[_Candidate], budget: int) -> Draft:
        """The most likely nodes, by the priors along their paths, of the trie of all continuations."""
        tokens: list[int] = []
        parents: list[int] = []
        buckets: list[int] = []
        waiting: list[tuple[float, int, int, int, int, int, list[_Candidate]]] = []
        num_seen = 0
        node, depth, path_prob, group = ROOT, 0, 1.0, candidates
        while True:
            for token, bucket, supporters in self._children(group, depth):
                child_prob = path_prob * self._priors[bucket]
                if child_prob >= self.min_prob:
                    # Of equally likely nodes the one found first is taken: recent occurrences before older ones.
                    num_seen += 1
                    heappush(waiting, (-child_prob, num_seen, token, node, bucket, depth + 1, supporters))
            if not waiting or len(tokens) == budget:
                return Draft.of(tokens, parents, buckets)
            negative, _, token, parent, bucket, depth, group = heappop(waiting)
            path_prob = -negative
            node = len(tokens)
            tokens.append(token)
            parents.append(parent)
            buckets.append(bucket)

    def _prior(self, child: tuple[int, int, list[_Candidate]]) -> float:
        return self._priors[child[1]]

    def _children(self, group: list[_Candidate], depth: int) -> Iterator[tuple[int, int, list[_Candidate]]]:
        """(token, bucket, the continuations with this token) after the `depth` tokens that `group` agrees on."""
        if len(group) == 1:
            match, store, followed = group[0]
            if depth < len(followed):
                yield followed[depth], self.bucket_rows[store][0][match + depth], group
            return
        by_token: dict[int, list[_Candidate]] = {}
        totals = [0, 0]
        for candidate in group:
            if depth < len(candidate[2]):
                by_token.setdefault(candidate[2][depth], []).append(candidate)
                totals[candidate[1]] += 1
        for token, supporters in by_token.items():
            # The text itself predicts better than other answers: where it has the token, their support does not count.
            store = supporters[0][1]
            matches = [candidate[0] for candidate in supporters if candidate[1] == store]
            n, total = len(matches), totals[store]
            yield token, self.bucket_rows[store][_support(n, total)][max(matches) + depth], supporters


def _support(n: int, total: int) -> int:
    """The index of the support in _PRIORS where n of `total` occurrences continue with the same token."""
    if n == total:
        return min(n, 3) - 1
    return MOST if 2 * n > total else _SOME if 3 * n >= total else _FEW


def _bucket_rows(num_lengths: int) -> list[list[list[int]]]:
    """[store][support][effective match length] -> bucket."""
    rows: list[list[list[int]]] = []
    first = 0
    for _, supports in _PRIORS:
        rows.append([])
        for priors in supports.values():
            starts = list(priors)
            rows[-1].append([first + max(0, sum(s <= n for s in starts) - 1) for n in range(num_lengths)])
            first += len(priors)
    return rows
