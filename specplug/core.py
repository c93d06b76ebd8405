"""The types that proposers, the planner and the engines share.

A proposer drafts a tree of tokens (Draft), the engine verifies part of it in one target pass, and the result (Step) is
reported to every proposer. This module depends on NumPy and the standard library alone.
Source: the flat tree layout follows SpecInfer's token tree (arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]

ROOT = -1
"""Parent of a node that directly follows the last verified token."""


def int_array(values: Sequence[int] | IntArray) -> IntArray:
    return np.asarray(values, dtype=np.int32)


# -- Drafts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A tree of draft tokens, flat and frozen. An empty draft is normal.

    tokens  int32[n]  the draft tokens
    parents int32[n]  parents[i] < i; ROOT (-1) is the last verified token
    buckets int32[n]  why node i was drafted: an index into the proposer's `buckets`; in a Step, into the buckets of the
                      fusion of several proposers, so proposers must not read it there
    """

    tokens: IntArray
    parents: IntArray
    buckets: IntArray

    @classmethod
    def of(cls, tokens: Sequence[int], parents: Sequence[int], buckets: Sequence[int]) -> Draft:
        """A draft from plain sequences of equal length."""
        return cls(int_array(tokens), int_array(parents), int_array(buckets))

    @classmethod
    def chain(cls, tokens: Sequence[int], buckets: Sequence[int]) -> Draft:
        """A draft without branches: node i follows node i - 1."""
        return cls(int_array(tokens), np.arange(-1, len(tokens) - 1, dtype=np.int32), int_array(buckets))

    def __len__(self) -> int:
        return len(self.tokens)

    def depths(self) -> IntArray:
        """int32[n]: the depth of each node; 1 for children of the root."""
        depths: list[int] = []
        for parent in self.parents.tolist():
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return int_array(depths)

    def select(self, nodes: Sequence[int]) -> Draft:
        """The subtree of `nodes`, with renumbered parents. Each node's parent must be listed before it, or be ROOT."""
        new_of = {ROOT: ROOT}
        old_parents = self.parents.tolist()
        parents = []
        for new, old in enumerate(nodes):
            parents.append(new_of[old_parents[old]])
            new_of[old] = new
        keep = np.asarray(nodes, dtype=np.intp)
        return Draft(self.tokens[keep], int_array(parents), self.buckets[keep])

    def check(self, *, num_tokens: int | None = None, num_buckets: int | None = None) -> None:
        """Raise ValueError unless this is a well-formed tree with ids below the two limits, where given."""
        n = len(self.tokens)
        if not (self.tokens.shape == self.parents.shape == self.buckets.shape == (n,)):
            raise ValueError("draft arrays differ in shape")
        if not (self.tokens.dtype == self.parents.dtype == self.buckets.dtype == np.int32):
            raise ValueError("draft arrays must be int32")
        if n == 0:
            return
        if (self.parents < ROOT).any() or (self.parents >= np.arange(n)).any():
            raise ValueError("a parent must come before its child")
        if self.tokens.min() < 0 or (num_tokens is not None and self.tokens.max() >= num_tokens):
            raise ValueError("a token id is outside the vocabulary")
        if self.buckets.min() < 0 or (num_buckets is not None and self.buckets.max() >= num_buckets):
            raise ValueError("a bucket is outside the proposer's table")
        if len(set(zip(self.parents.tolist(), self.tokens.tolist(), strict=True))) != n:
            raise ValueError("two siblings have the same token")


EMPTY = Draft.of([], [], [])


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """The limits of a target's memory for drafts. Attention can discard any tokens; a recurrent state cannot.

    trees    whether a draft may branch
    depth    longest chain that can be taken back, tokens; None for any length
    even     whether all sequences of a pass need equally many rows: shorter chains are filled up with rows that are
             rejected
    rereads  whether, after a draft that was not accepted to its end, the rows that were right are evaluated once more
    """

    trees: bool = True
    depth: int | None = None
    even: bool = False
    rereads: bool = False

    def rows(self, drafts: Sequence[Draft]) -> int:
        """Rows of a pass that verifies these drafts, one for each sequence."""
        if self.even:
            return len(drafts) * (1 + max(map(len, drafts), default=0))
        return len(drafts) + sum(map(len, drafts))


NO_LIMITS = DraftLimits()


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The result of one verification for one sequence.

    emitted  the new tokens in order, at least one: the accepted draft tokens, then the target's own token
    draft    the tree that was verified, possibly empty
    accepted the nodes of `draft` that were accepted, root to leaf; len(emitted) == len(accepted) + 1
             unless generation stopped inside the accepted path
    topk     int32[n + 1, k], most likely first: row 0 belongs to the last verified token, row i + 1 to node i of
             `draft`. None in steps in which no proposer that requires it was asked; k is the most that those asked
             require, so it may be less than this proposer's own `requires`
    """

    emitted: list[int]
    draft: Draft
    accepted: list[int]
    topk: IntArray | None = None


# -- Proposers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Requires:
    """What a proposer requires of an engine (`requires`), or what an engine provides (`provides`).

    topk        number of most likely ids of the target per row
    hidden      hidden states of the target
    builtin     a drafter of the engine's own, which the proposer only names
    drafter     a draft model that the engine opens, which the proposer only names
    constraint  the constraints of requests
    """

    topk: int = 0
    hidden: bool = False
    builtin: bool = False
    drafter: bool = False
    constraint: bool = False

    def missing_from(self, provides: Requires) -> list[str]:
        """The names of the requirements that `provides` does not meet; empty if it meets all."""
        missing = [f"TOPK({self.topk})"] if self.topk > provides.topk else []
        names = ("hidden", "builtin", "drafter", "constraint")
        return missing + [name.upper() for name in names if getattr(self, name) and not getattr(provides, name)]

    def union(self, other: Requires) -> Requires:
        return Requires(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class Bucket:
    """A reason to draft a token, by which the planner learns how often such tokens are accepted.

    `prior` is the probability, before anything was learned, that a node is accepted given that its parent was.
    """

    name: str
    prior: float


@runtime_checkable
class Proposer(Protocol):
    """Drafts the next tokens of sequences, several of which may run at once.

    A draft never exceeds its budget. The same inputs give the same draft. Nothing about `seq` survives `end`, except in
    attributes named `shared_*`, which are bounded. `propose` does no input or output.
    `specplug.testing.ProposerContract` checks all of this.
    """

    requires: Requires
    buckets: tuple[Bucket, ...]

    def begin(self, seq: int, prompt: IntArray) -> None:
        """Start a sequence. The last token of `prompt` (int32[n], n >= 1) is the first root."""

    def propose(self, seq: int, budget: int) -> Draft:
        """A draft of at most `budget` nodes after the last known token of `seq`. Changes no visible state."""

    def observe(self, seq: int, step: Step) -> None:
        """Append `step.emitted` to the sequence, and learn from the rest of the step.

        Steps in which no proposer was asked follow later and in order, before the next `propose` or `end`.
        """

    def end(self, seq: int) -> None:
        """Forget `seq`."""


@dataclass(frozen=True, slots=True)
class SequenceOptions:
    """What the request of a sequence asks for.

    corpora  names of the corpora to draft from; None leaves the choice to the profile
    private  nothing of the sequence may be kept when the process ends
    """

    corpora: tuple[str, ...] | None = None
    private: bool = False


NO_OPTIONS = SequenceOptions()


@runtime_checkable
class Configurable(Protocol):
    """A proposer that drafts otherwise for a sequence whose request asks for it. It is optional."""

    def configure(self, seq: int, options: SequenceOptions) -> None:
        """Called right before `begin` of the same sequence. Where it is not called, the options are NO_OPTIONS."""


class TokenConstraint(Protocol):
    """The tokens that a request allows next, such as by a JSON schema, after those that were emitted so far."""

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` are allowed, one after the other. Changes nothing."""

    def forced(self) -> Sequence[int]:
        """The tokens that are the only ones allowed, one after the other; empty where there is a choice."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Move past `tokens`. Raises ValueError, without a move, where one of them is not allowed.

        Raises SpecplugError beyond its limits; then it allows and forces nothing any more.
        """

    def go_back(self, count: int) -> None:
        """Undo the last `count` tokens of `advance`."""

    def style(self) -> TokenConstraint | None:
        """A constraint at the same place that allows some of the texts that this one allows, such as JSON that goes on
        with the spacing of the text so far; None where there is none. What it forces is likely, but not certain.
        """


@runtime_checkable
class Constrained(Protocol):
    """A proposer that drafts for sequences with a constraint only, and is asked for no others. It is optional."""

    def use_constraint(self, seq: int, constraint: TokenConstraint) -> None:
        """Called right before `begin` of a sequence whose request has a constraint.

        The constraint is after the last token of the prompt that `begin` receives. Whoever calls this advances it along
        the emitted tokens, before `observe`; `propose` may move it, and has to move it back.
        """


@runtime_checkable
class BatchProposer(Protocol):
    """A proposer that can also draft for several sequences in one call.

    It is optional, for proposers that are faster this way, such as one that runs one model pass for all sequences.
    """

    def propose_batch(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[Draft]:
        """For each of `seqs` the draft that `propose` returns for its budget. Changes no visible state."""


class DraftAdvice(Protocol):
    """Tells a model-based proposer how far to draft, and learns from it which of its draft tokens were right."""

    def another_pays(self, seq: int, chain: Sequence[int], rows: int) -> bool:
        """Whether to draft one more token of `seq` after a chain with these buckets.

        rows  sequences for which a token is drafted in the same pass of the drafter
        """

    def reading_pays(self, seq: int, price_ms: float) -> bool:
        """Whether drafting is expected to save more over the rest of `seq` than reading for so many milliseconds."""

    def learn(self, seq: int, right: int, tested: int) -> None:
        """Of the latest chain of `seq`, `tested` tokens were compared with the target's; `right` of them agreed."""


@runtime_checkable
class ChoiceAdvice(DraftAdvice, Protocol):
    """Advice for a proposer that can draft in several ways, such as with more or with fewer layers."""

    def saved_ms(self, rate: float, draft_ms: float) -> float:
        """Time that drafting saves per emitted token with chains of the best length; negative where all lose.

        rate      share of draft tokens that are right, given that those before them were
        draft_ms  time to draft one token for each running sequence in one pass, milliseconds
        """

    def expect(self, rate: float) -> None:
        """From now on this share of draft tokens is expected to be right, as the proposer drafts in another way."""


@runtime_checkable
class ModelBased(Protocol):
    """A proposer that runs passes of a model to draft, so that each draft token is expensive.

    Reading is separate from drafting, so that it can be paid for, or not, before the proposer is asked, and happens in
    pieces. `propose` reads what is left.

    passes    passes run so far in order to draft
    advice    set by the speculator; None without one, then each chain is as long as its budget
    """

    passes: int
    advice: DraftAdvice | None

    @property
    def retry_ms(self) -> float:
        """Time that `score` takes, which is more than that of `time_pass`, milliseconds."""

    def pass_ms(self, rows: int) -> float:
        """Time to draft one token for each of `rows` sequences in one pass, milliseconds."""

    def reading_ms(self, seq: int) -> float:
        """Time to read what `propose` needs before it can draft for `seq`, milliseconds; 0 if all of it was read."""

    def read(self, seqs: Sequence[int], ms: float) -> None:
        """Read for the first of `seqs`, then for the next, for about `ms` milliseconds, and one piece at least."""

    def score(self, seq: int) -> tuple[int, int]:
        """Compare recently emitted tokens of `seq` with the drafter's likeliest ones, given few tokens before them.

        Returns how many agree, and how many were compared. One pass; no target pass is involved.
        """

    def time_pass(self) -> None:
        """Time one pass, in case the cost of drafting has fallen."""


@dataclass(frozen=True, slots=True, eq=False)
class Likeliest:
    """The tokens that a model expects most at one place.

    tokens         int32[k], likeliest first
    probabilities  float64[k]
    """

    tokens: IntArray
    probabilities: FloatArray


@runtime_checkable
class Judge(Protocol):
    """A model-based proposer that also tells how likely tokens are that it did not draft.

    It is optional. A fusion judges the draft tokens of other proposers by it.

    judged_top  how many tokens per place `likeliest` returns; the fusion sets it. 0, the initial value, for none
    """

    judged_top: int

    def likeliest(self, seq: int) -> Sequence[Likeliest]:
        """The likeliest tokens at each place of its latest draft of `seq`, without another pass.

        The first place is the root, and each other one follows the first draft token of the place before, the likeliest
        in the chain. Empty where nothing was drafted since the last `observe`.
        """

    def knows(self, token: int) -> bool:
        """Whether it can draft the token: a trimmed head lacks most of the vocabulary, and says nothing about it."""


@runtime_checkable
class Stateful(Protocol):
    """A proposer whose learned `shared_*` state can be kept between processes."""

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays to write to a `.npz` file."""

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Load arrays that `state` returned. Raises ValueError if shapes or dtypes do not fit."""
