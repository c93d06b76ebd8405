"""A chain of draft tokens that is being made from rows of logits, with runners-up beside it.

Depends on logits, and not on a context or a text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from specplug.core import ROOT, Draft, IntArray, Likeliest
from specplug.drafts.confidence import EDGES, bucket_of
from specplug.engines.llama_cpp.context import Logits
from specplug.engines.llama_cpp.sampling import SamplerCopy
from specplug.generation.topk import top_ids


@dataclass(slots=True)
class Chain:
    """A draft for one sequence.

    budget  most nodes
    most    longest chain
    draws   draws the tokens; None for the likeliest ones
    path    the buckets of the chain, without runners-up
    last    the node at its end
    """

    seq: int
    budget: int
    most: int
    draws: SamplerCopy | None
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    buckets: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    last: int = ROOT

    @property
    def is_full(self) -> bool:
        return len(self.path) >= self.most or len(self.tokens) >= self.budget

    def add_last(self, token: int, bucket: int) -> None:
        """Make the chain longer by one token."""
        self._add(token, self.last, bucket)
        self.last = len(self.tokens) - 1
        self.path.append(bucket)

    def add_runner_up(self, token: int, bucket: int) -> None:
        """Add a token beside the last one."""
        self._add(token, self.parents[self.last], bucket)

    def draft(self) -> Draft:
        return Draft.of(self.tokens, self.parents, self.buckets)

    def _add(self, token: int, parent: int, bucket: int) -> None:
        self.tokens.append(token)
        self.parents.append(parent)
        self.buckets.append(bucket)


def probability_of(logits: Logits, row: int) -> float:
    """The probability of a row of the head."""
    return float(1.0 / np.exp(logits - logits[row]).sum())


def likeliest_tokens(logits: Logits, ids: IntArray | None, k: int, row: int, probability: float) -> Likeliest:
    """The k likeliest tokens.

    ids          int32[rows of the head]: the token of each row; None if row i belongs to token i
    probability  that of `row`, from which the others follow
    """
    top = top_ids(logits[None], min(k, len(logits)))[0]
    probabilities = probability * np.exp(logits[top].astype(np.float64) - logits[row])
    return Likeliest(top if ids is None else ids[top], probabilities)


def runner_up(logits: Logits, best: int) -> tuple[int, int]:
    """The second likeliest row, and its bucket among those of runners-up."""
    rest = logits.copy()
    rest[best] = -np.inf
    second = int(rest.argmax())
    return second, len(EDGES) + 1 + bucket_of(probability_of(logits, second))
