"""Retrieval from corpora on disk: it drafts what followed the end of the text in the documents of a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from operator import itemgetter
from typing import Literal

import numpy as np

from specplug.core import EMPTY, ROOT, Bucket, Draft, IntArray, Proposer, Requires, SequenceOptions, Step
from specplug.corpora.folder import Corpus, open_corpus
from specplug.corpora.matching import LONGEST, Text, longest_match
from specplug.corpora.shard import Interval, Shard
from specplug.drafts.chains import Chains, ChainSteps
from specplug.errors import UsageError

_PRIORS: dict[str, dict[int, float]] = {
    "one": {2: 0.04, 3: 0.16, 4: 0.24, 6: 0.34, 8: 0.45, 12: 0.55, 16: 0.62, 24: 0.70},
    "few": {2: 0.14, 3: 0.30, 4: 0.48, 6: 0.62, 8: 0.75, 12: 0.82, 16: 0.88},
    "many": {2: 0.45, 3: 0.58, 4: 0.68, 6: 0.78, 8: 0.86, 12: 0.92},
    "most": {2: 0.27, 3: 0.35, 4: 0.38, 6: 0.40, 8: 0.45, 12: 0.50},
    "some": {2: 0.10, 3: 0.13, 4: 0.15, 6: 0.12, 8: 0.13},
    "rare": {2: 0.01, 4: 0.02, 8: 0.03},
}
"""Share of draft tokens that are accepted, by two properties. They follow the counts on Python code in
docs/lab-book/corpora.md; where few were counted, they lie between their neighbours, or continue them.

Support: all of 1, of 2 to 7, or of 8 or more occurrences continue with this token (`one`, `few`, `many`), or more than
half of them (`most`), a fifth or more (`some`), fewer (`rare`).
Effective match length, from each key to below the next: the match at the root plus one per draft token before this one.
"""

FEW, MANY = 2, 8
"""Occurrences from which their support is `few`, and `many`, where all continue with one token."""

MOST = 3
"""The index of the support `most`; `some` and `rare` follow."""

LONGEST_EFFECTIVE = 64
"""Tokens. Longer effective matches count as this long."""

SAMPLE = 64
"""Occurrences per shard whose continuations are read."""

ANY_TOKENS = 1 << 31
"""The size of the vocabulary where no corpus limits it."""


class Datastore:
    """Drafts a tree: the merged continuations of up to 64 occurrences of the longest match, over all corpora.

    Source: REST (arXiv 2311.08252) for the datastore and the tree. Its first 5,000 occurrences in the order of their
    continuations prefer small ids; this takes an evenly spaced sample of all. It ranks draft tokens by counts; this
    one by how often tokens of the same support and match length were accepted, and these are its buckets.
    State: 32 tokens per running sequence, and four numbers per sequence and shard. `shared_corpora`: maps of files, and
    4 bytes per token of the vocabulary and shard. Requires: nothing.
    Cost per step: see docs/lab-book/corpora.md.

    corpora          names of corpora, or paths with a slash; none is possible, as they can be opened later
    max_draft        longest path of a draft, tokens
    min_match        fewest tokens that have to match
    min_prob         least probability of a path, by the priors
    lookups          where many sequences draft chains at once: at most so many look up in one step; they take turns
    device_memory    in vLLM's V2 runner, where all sequences look up: MiB of its memory that shards may take
    corpora_for      asking: a sequence whose request names no corpora drafts from none. all: it drafts from all
    request_corpora  names that requests may ask for; None for those that are open
    """

    requires = Requires()
    buckets: tuple[Bucket, ...] = tuple(
        Bucket(f"{support} {length}", prior) for support, priors in _PRIORS.items() for length, prior in priors.items()
    )

    def __init__(
        self,
        *,
        corpora: Sequence[str],
        max_draft: int = 16,
        min_match: int = 2,
        min_prob: float = 0.02,
        lookups: int = 6,
        device_memory: int = 1024,
        corpora_for: Literal["all", "asking"] = "all",
        request_corpora: Sequence[str] | None = None,
    ) -> None:
        """UsageError for a corpus that is missing or damaged, ValueError for an option out of range."""
        positive = min(max_draft, lookups, device_memory) >= 1
        if not positive or not 1 <= min_match <= LONGEST or not 0.0 <= min_prob <= 1.0:
            raise ValueError(
                f"max_draft {max_draft}, min_match {min_match}, lookups {lookups}, min_prob {min_prob}, device_memory "
                f"{device_memory}: need >= 1, 1 to {LONGEST}, >= 1, a probability and >= 1"
            )
        self.max_draft = max_draft
        self.min_match = min_match
        self.min_prob = min_prob
        self.lookups = lookups
        self.device_memory = device_memory
        self.corpora_for = corpora_for
        self.request_corpora = request_corpora
        self.shared_corpora: tuple[Corpus, ...] = ()
        self.expected: str | None = None
        """The name of a corpus that is opened as soon as it holds something."""
        self._num_tokens = ANY_TOKENS
        self._texts: dict[int, Text] = {}
        self._chosen: dict[int, frozenset[str]] = {}
        """By sequence, the names that its request asks for; the others have `_default_names`."""
        self._default_names = None if corpora_for == "all" else frozenset[str]()
        """What a sequence drafts from whose request names no corpora; None for all."""
        self._last_lookup: dict[int, int] = {}
        """The step in which each sequence looked up last, where many draft chains at once."""
        self._step = 0
        self._looking_up: tuple[int, ...] = ()
        self._priors = [bucket.prior for bucket in self.buckets]
        self.bucket_rows = _bucket_rows()
        self.use_corpora([open_corpus(ref) for ref in corpora])

    @property
    def by_request(self) -> bool:
        """Whether requests decide what they draft from."""
        return self.corpora_for == "asking" or self.request_corpora is not None

    @property
    def offered(self) -> list[str]:
        """The names of the open corpora, and of the one that is expected, that a request may ask for."""
        names = [corpus.name for corpus in self.shared_corpora]
        if self.expected is not None and self.expected not in names:
            names.append(self.expected)
        return names if self.request_corpora is None else [name for name in names if name in self.request_corpora]

    def use_corpora(self, corpora: Sequence[Corpus]) -> None:
        """Draft from these corpora from now on, running sequences included. Call it between two steps.

        ValueError where two have one name, or were made with different tokenizers; then nothing changes.
        """
        names = [corpus.name for corpus in corpora]
        if len(set(names)) < len(names):
            raise ValueError(f"corpora: {', '.join(names)}: two have one name; leave one out, or rename its folder")
        if len({corpus.manifest.tokenizer for corpus in corpora}) > 1:
            raise ValueError(f"corpora: {', '.join(names)}: they were made with different tokenizers")
        self.shared_corpora = tuple(corpora)
        self._num_tokens = min((corpus.manifest.num_tokens for corpus in corpora), default=ANY_TOKENS)
        numbers = {shard.number for corpus in corpora for shard in corpus.shards}
        for text in self._texts.values():
            text.use_shards(numbers, self._num_tokens)

    def open(self, corpus: Corpus) -> bool:
        """Draft from a corpus, too, in place of an open one of its name; whether there was none. Call it between
        steps.

        UsageError where one from another folder is open by this name, or they do not fit together.
        """
        known = {one.name: one for one in self.shared_corpora}
        before = known.get(corpus.name)
        if before is not None and before.folder != corpus.folder:
            raise UsageError(f"corpus {corpus.name}: one from another folder is open by this name; remove it first")
        if before is None or before.manifest != corpus.manifest:
            try:
                self.use_corpora([*(known | {corpus.name: corpus}).values()])
            except ValueError as error:
                raise UsageError(str(error)) from None
        return before is None

    def close(self, name: str) -> bool:
        """Draft no longer from the corpus of this name; whether there was one. Call it between steps."""
        kept = [one for one in self.shared_corpora if one.name != name]
        was_expected = self.expected == name
        if was_expected:
            self.expected = None
        if len(kept) == len(self.shared_corpora):
            return was_expected
        self.use_corpora(kept)
        return True

    def configure(self, seq: int, options: SequenceOptions) -> None:
        self._chosen.pop(seq, None)
        if options.corpora is not None:
            allowed = options.corpora if self.request_corpora is None else self.request_corpora
            self._chosen[seq] = frozenset(options.corpora).intersection(allowed)

    def begin(self, seq: int, prompt: IntArray) -> None:
        text = self._texts[seq] = Text(self._num_tokens)
        text.append(prompt.tolist())

    def propose(self, seq: int, budget: int) -> Draft:
        found = self._continuations(seq, min(budget, self.max_draft))
        return EMPTY if found is None else self._tree(*found, budget)

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        """Of more than `lookups` sequences, those look up that did so longest ago; the others draft nothing."""
        tokens: list[list[int]] = [[] for _ in seqs]
        buckets: list[list[int]] = [[] for _ in seqs]
        drafting = [index for index, seq in enumerate(seqs) if self._corpora_of(seq)]
        waiting = sorted(drafting, key=lambda index: self._last_lookup.get(seqs[index], -1))[: self.lookups]
        self._looking_up = tuple(seqs[index] for index in waiting)
        for index in waiting:
            found = self._continuations(seqs[index], min(k, self.max_draft))
            if found is not None:
                tokens[index], buckets[index] = self._chain(*found)
        return Chains.of(tokens, buckets, k)

    def observe(self, seq: int, step: Step) -> None:
        self._texts[seq].append(step.emitted)

    def observe_chains(self, steps: ChainSteps) -> None:
        self._step += 1
        self._last_lookup.update(dict.fromkeys((seq for seq in self._looking_up if seq in self._texts), self._step))
        self._looking_up = ()
        for seq, emitted in zip(steps.seqs, steps.emitted, strict=True):
            self._texts[seq].append(emitted)

    def end(self, seq: int) -> None:
        self._last_lookup.pop(seq, None)
        self._chosen.pop(seq, None)
        del self._texts[seq]

    def _corpora_of(self, seq: int) -> Sequence[Corpus]:
        """The open corpora that a sequence drafts from."""
        names = self._chosen.get(seq, self._default_names)
        return self.shared_corpora if names is None else [one for one in self.shared_corpora if one.name in names]

    def _matches(self, seq: int) -> tuple[int, list[tuple[Shard, Interval]]]:
        """The length of the longest match, and the suffixes of each shard that start with it."""
        longest = 0
        found: list[tuple[Shard, Interval]] = []
        text = self._texts[seq]
        for corpus in self._corpora_of(seq):
            for shard in corpus.shards:
                if not shard.loaded.is_set():  # a search could wait for the disk: rather skip a guess
                    continue
                length, interval = longest_match(text, shard, self.min_match)
                if length > longest:
                    longest, found = length, []
                if length and length == longest:
                    found.append((shard, interval))
        return longest, found

    def _continuations(self, seq: int, depth: int) -> tuple[list[list[int]], list[float], int] | None:
        """What follows a sample of the occurrences of the longest match, sorted, with -1 after its end; the occurrences
        that each stands for; and the length of the match. None where nothing matches."""
        if depth <= 0:
            return None
        length, found = self._matches(seq)
        if not found:
            return None
        parts = [shard.following(interval, length, SAMPLE, depth) for shard, interval in found]
        weights = [
            np.full(len(part), (high - low) / len(part)) for part, (_, (low, high)) in zip(parts, found, strict=True)
        ]
        rows, weight = parts[0], weights[0]
        if len(parts) > 1:
            rows, weight = np.concatenate(parts), np.concatenate(weights)
            order = np.lexsort(rows.T[::-1])
            rows, weight = rows[order], weight[order]
        return rows.tolist(), weight.tolist(), length

    def _chain(self, rows: list[list[int]], weights: list[float], match: int) -> tuple[list[int], list[int]]:
        """The tokens that most occurrences have next, of several the one with the smallest id; and their buckets. It
        ends where its probability, by the priors, is too small.

        rows, weights, match  as `_continuations` returns them
        """
        tokens: list[int] = []
        buckets: list[int] = []
        path, first, end = 1.0, 0, len(rows)
        for depth in range(len(rows[0])):
            children = _children(rows, weights, depth, first, end)
            if not children:
                break
            total = sum(child[1] for child in children)
            token, weight, first, end = max(children, key=itemgetter(1))
            bucket = self.bucket_rows[_support(weight, total)][min(match + depth, LONGEST_EFFECTIVE)]
            path *= self._priors[bucket]
            if path < self.min_prob:
                break
            tokens.append(token)
            buckets.append(bucket)
        return tokens, buckets

    def _tree(self, rows: list[list[int]], weights: list[float], match: int, budget: int) -> Draft:
        """The most likely nodes, by the priors along their paths, of the trie of sorted continuations.

        rows, weights, match  as `_continuations` returns them
        """
        tokens: list[int] = []
        parents: list[int] = []
        buckets: list[int] = []
        waiting: list[tuple[float, int, int, int, int, int, int, int]] = []
        num_seen, longest = 0, len(rows[0])
        node, depth, path, first, end = ROOT, 0, 1.0, 0, len(rows)
        while True:
            if depth < longest:
                effective = min(match + depth, LONGEST_EFFECTIVE)
                children = _children(rows, weights, depth, first, end)
                total = sum(child[1] for child in children)
                for token, weight, child_first, child_end in children:
                    bucket = self.bucket_rows[_support(weight, total)][effective]
                    likely = path * self._priors[bucket]
                    if likely >= self.min_prob:
                        num_seen += 1
                        heappush(waiting, (-likely, num_seen, token, node, bucket, depth + 1, child_first, child_end))
            if not waiting or len(tokens) == budget:
                return Draft.of(tokens, parents, buckets)
            negative, _, token, parent, bucket, depth, first, end = heappop(waiting)
            path, node = -negative, len(tokens)
            tokens.append(token)
            parents.append(parent)
            buckets.append(bucket)


def wait_for_corpora(proposers: Iterable[Proposer]) -> None:
    """Wait until all files were read, where drafts must not depend on how fast a disk is: in comparisons, and where
    several ranks have to draft alike."""
    for proposer in proposers:
        if isinstance(proposer, Datastore):
            for corpus in proposer.shared_corpora:
                for shard in corpus.shards:
                    shard.loaded.wait()


def datastore_of(proposers: Iterable[Proposer]) -> Datastore | None:
    """The proposer of a profile that drafts from corpora; None where there is none."""
    return next((one for one in proposers if isinstance(one, Datastore)), None)


def _children(
    rows: list[list[int]], weights: list[float], depth: int, first: int, end: int
) -> list[tuple[int, float, int, int]]:
    """(token, weight, first row, end) of every token at a depth of the rows from `first` to before `end`."""
    if end - first == 1:
        token = rows[first][depth]
        return [(token, weights[first], first, end)] if token >= 0 else []
    children = []
    begin, weight, current = first, 0.0, rows[first][depth]
    for at in range(first, end):
        token = rows[at][depth]
        if token != current:
            if current >= 0:
                children.append((current, weight, begin, at))
            begin, weight, current = at, 0.0, token
        weight += weights[at]
    if current >= 0:
        children.append((current, weight, begin, end))
    return children


def _support(weight: float, total: float) -> int:
    """The index of the support in _PRIORS where `weight` of `total` occurrences continue with a token."""
    if weight >= total:
        return 0 if total < FEW else 1 if total < MANY else 2
    return MOST if 2 * weight > total else MOST + 1 if 5 * weight >= total else MOST + 2


def _bucket_rows() -> list[list[int]]:
    """[support][effective match length] -> bucket."""
    rows, first = [], 0
    for priors in _PRIORS.values():
        starts = list(priors)
        rows.append([first + max(0, sum(s <= n for s in starts) - 1) for n in range(LONGEST_EFFECTIVE + 1)])
        first += len(priors)
    return rows
