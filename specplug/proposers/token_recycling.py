"""Token recycling: it drafts the ids that the target ranked highest the last time it read the same token.

Per token id it keeps the target's most likely successors and how reliable they have been. It uses no context beyond one
token, and no probabilities but those that it counts itself.
Source: Token Recycling (arXiv 2408.08696); `shape: paper` is its static tree of 80 nodes. This one differs: rows that
are unknown are skipped instead of drafting id 0; pairs of tokens in the prompt fill such rows; where a token is in a
tree twice, the row of the accepted node is kept; and `shape: best_first` grows the tree that the counted probabilities
favour.
State: matrix int32[V, k] (1.5 MiB at V = 49k, k = 8; 8 MiB at 262k), kind int8[V]; V grows in powers of two.
Requires: TOPK(k). In steps without top ids only the emitted pairs of tokens are learned.
Cost per step: 30 us to grow 16 nodes, 15 us to learn, plus reading the top ids in the engine.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from specplug.core import EMPTY, ROOT, Bucket, Draft, IntArray, Requires, Step
from specplug.drafts.chains import Chains, ChainSteps
from specplug.drafts.trees import likeliest
from specplug.errors import UsageError
from specplug.machine.files import write_atomically

UNKNOWN = -1
"""Fills the rest of a row of the matrix, whose ids are distinct."""

PAPER_TREE = """
    0 1 2 3 4 5 6 7
    00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70
    000 001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070 100 101 110 200 300 400 500
    0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000
    00000 00001 00002 00010 00020 00100 01000 10000
    000000 000001 000100
"""
"""The authors' static tree, named 2.2.2: 80 nodes, level by level. Each is written as its path of ranks."""

_PAPER_PLACES = {path: place for place, path in enumerate(PAPER_TREE.split())}
_PAPER_NODES = [(_PAPER_PLACES.get(path[:-1], ROOT), int(path[-1])) for path in _PAPER_PLACES]
"""(index of the parent, rank) of each node."""

COUNTS = 4
"""States of a token's reliability counter: as in a branch predictor it goes up if rank 0 was right, and else down."""

ROW = COUNTS
"""Added to the counter if the row is from the target's top ids, and not only from pairs of tokens in the text."""

START = 1
"""The counter of a new token."""

RATE = 0.01
"""Weight of a new observation in the counted probabilities. Chosen, not measured."""

PRIORS = (
    (0.32, 0.15, 0.06, 0.04, 0.03, 0.02, 0.01, 0.01),
    (0.40, 0.13, 0.05, 0.04, 0.03, 0.02, 0.01, 0.01),
    (0.55, 0.12, 0.05, 0.03, 0.01, 0.01, 0.01, 0.01),
    (0.80, 0.08, 0.03, 0.02, 0.01, 0.01, 0.01, 0.01),
)
"""P(accepted) by counter and rank; further ranks are as likely as the last one. Measured with
benchmarks/recycling_vs_paper.py."""


class TokenRecycling:
    """Drafts a tree from the matrix of successors; source, state and costs are in the module's docstring.

    The kind of a token's row, 0 to 7, is its reliability counter, plus ROW if the row is from top ids.

    k              ids per row of the matrix
    shape          best_first, or the paper's static tree
    warm           a file written by `save`, to start from
    tokenizer_hash of the tokenizer that `warm` must be made for (`specplug.models.references.tokenizer_hash`)
    """

    def __init__(
        self,
        *,
        k: int = 8,
        shape: Literal["best_first", "paper"] = "best_first",
        warm: str | None = None,
        tokenizer_hash: str | None = None,
    ) -> None:
        if not 1 <= k <= 64:
            raise ValueError(f"k is {k}; use a number from 1 to 64")
        if shape == "paper" and k < 8:
            raise ValueError(f"k is {k}; the paper's tree has ranks up to 7, so use k: 8 or more")
        self.k = k
        self.shape = shape
        self.requires = Requires(topk=k)
        priors = [[line[min(rank, len(line) - 1)] for rank in range(k)] for line in PRIORS] * 2
        self.buckets = tuple(
            Bucket(f"{'row' if kind >= ROW else 'pair'} {kind % COUNTS} rank {rank}", prior)
            for kind, line in enumerate(priors)
            for rank, prior in enumerate(line)
        )
        self.shared_matrix: IntArray = np.full((0, k), UNKNOWN, dtype=np.int32)
        self.shared_kind: npt.NDArray[np.int8] = np.full(0, START, dtype=np.int8)
        self.shared_probability = priors
        self._last: dict[int, int] = {}
        if warm is not None:
            if tokenizer_hash is None:
                raise UsageError(f"warm: {warm} requires the option tokenizer_hash; add it, or leave out warm")
            self.load(warm, tokenizer_hash)

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._last[seq] = int(prompt[-1]) if len(prompt) else UNKNOWN
        if len(prompt) > 1:
            self._reserve(int(prompt.max()))
            self._fill_unknown_rows(prompt)

    def propose(self, seq: int, budget: int) -> Draft:
        root = self._last[seq]
        if budget <= 0 or root == UNKNOWN:
            return EMPTY
        return self._fill(root, budget) if self.shape == "paper" else self._grow(root, budget)

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        """The chain that takes, token by token, the successor with the largest counted probability for its kind of row.

        Other paths are not tried: a less likely token loses more at its place than its row can add later.
        """
        chains = Chains.empty(len(seqs), k)
        if not len(self.shared_matrix):
            return chains
        best = np.asarray(self.shared_probability).argmax(axis=1)
        current = np.array([self._last[seq] for seq in seqs], dtype=np.int64)
        for depth in range(k):
            known = (current >= 0) & (current < len(self.shared_matrix))
            if not known.any():
                break
            row = np.where(known, current, 0)
            kind = self.shared_kind[row]
            rank = best[kind]
            token = self.shared_matrix[row, rank]
            rank = np.where(token == UNKNOWN, 0, rank)
            current = np.where(known, self.shared_matrix[row, rank], UNKNOWN)
            chains.tokens[:, depth] = current
            chains.buckets[:, depth] = np.where(current == UNKNOWN, 0, kind * np.int64(self.k) + rank)
        return chains

    def observe(self, seq: int, step: Step) -> None:
        last = self._last[seq]
        highest = max(last, *step.emitted)
        if len(step.draft):
            highest = max(highest, int(step.draft.tokens.max()))
        self._reserve(highest)
        if last != UNKNOWN:
            self._score(last, step.emitted)
            if step.topk is None:
                for token, follower in zip([last, *step.emitted], step.emitted, strict=False):
                    self._put_first(token, follower)
            else:
                self._overwrite(last, step, step.topk)
        self._last[seq] = step.emitted[-1]

    def observe_chains(self, steps: ChainSteps) -> None:
        before, after = steps.before, steps.after
        highest = max(int(before.max(initial=0)), int(after.max(initial=0)), int(steps.read.max(initial=0)))
        self._reserve(highest)
        self._score_pairs(before, after)
        if steps.topk is None:
            self._put_first_pairs(before, after)
        else:
            self.shared_matrix[steps.read] = self._fit(steps.topk)
            self.shared_kind[steps.read] |= ROW
        for seq, emitted in zip(steps.seqs, steps.emitted, strict=True):
            self._last[seq] = emitted[-1]

    def end(self, seq: int) -> None:
        del self._last[seq]

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """matrix int32[V, k]; kind int8[V]; probability float64[8, k]."""
        # Rows may hold ids beyond the matrix that were never looked up.
        self._reserve(int(self.shared_matrix.max(initial=UNKNOWN)))
        return {
            "matrix": self.shared_matrix.copy(),
            "kind": self.shared_kind.copy(),
            "probability": np.asarray(self.shared_probability),
        }

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        missing = [name for name in ("matrix", "kind", "probability") if name not in state]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        matrix, kind, probability = state["matrix"], state["kind"], state["probability"]
        if matrix.dtype != np.int32 or matrix.ndim != 2 or matrix.shape[1] != self.k:
            raise ValueError(f"matrix is {matrix.dtype}{list(matrix.shape)}, and k is {self.k}")
        if kind.dtype != np.int8 or kind.shape != matrix.shape[:1]:
            raise ValueError(f"kind is {kind.dtype}{list(kind.shape)}, and the matrix has {len(matrix)} rows")
        if probability.dtype != np.float64 or probability.shape != (2 * COUNTS, self.k):
            raise ValueError(f"probability is {probability.dtype}{list(probability.shape)}, and k is {self.k}")
        if matrix.size and (matrix.min() < UNKNOWN or matrix.max() >= len(matrix)):
            raise ValueError("matrix holds ids outside its vocabulary")
        ordered = np.sort(matrix, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != UNKNOWN)
        gap = (matrix[:, 1:] != UNKNOWN) & (matrix[:, :-1] == UNKNOWN)
        if twice.any() or gap.any():
            raise ValueError("a row of the matrix repeats an id or has a gap")
        if kind.size and (kind.min() < 0 or kind.max() >= 2 * COUNTS):
            raise ValueError("kind is out of range")
        if not ((probability >= 0.0) & (probability <= 1.0)).all():
            raise ValueError("probability is out of range")
        self.shared_matrix = matrix.copy()
        self.shared_kind = kind.copy()
        self.shared_probability = probability.tolist()

    def save(self, path: str | Path, tokenizer_hash: str) -> None:
        """Write the state to a `.npz` file, completely or not at all. Raises SpecplugError if that fails."""
        target = Path(path)
        if target.exists() and not target.is_file():
            raise UsageError(f"{target}: not a file; name a file to write the recycling matrix to")
        content = io.BytesIO()
        arrays: dict[str, Any] = {"tokenizer_hash": np.array(tokenizer_hash), **self.state()}
        np.savez_compressed(content, **arrays)
        write_atomically(target, content.getvalue())

    def load(self, path: str | Path, tokenizer_hash: str) -> None:
        """Load a file written by `save`. Raises UsageError if it is none, or if it was made for another tokenizer."""
        try:
            # Opened here, as NumPy would leave a damaged file open.
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                state = {name: file[name] for name in file.files}
        except OSError as error:
            raise UsageError(f"{path}: cannot read the recycling matrix ({error.strerror or error})") from error
        except (ValueError, EOFError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UsageError(f"{path}: damaged, or not a recycling matrix ({error}); leave out warm") from error
        made_for = str(state.pop("tokenizer_hash", "none"))
        if made_for != tokenizer_hash:
            raise UsageError(
                f"{path}: made for tokenizer {made_for[:12]}, the model has {tokenizer_hash[:12]}; use one made for it"
            )
        try:
            self.load_state(state)
        except ValueError as error:
            raise UsageError(f"{path}: the recycling matrix does not fit: {error}; leave out warm") from error

    # -- drafting ------------------------------------------------------------------------------------------------

    def _successors(self, token: int) -> tuple[list[int], int]:
        """The known successors of `token`, likeliest first, and the kind of its row."""
        if token >= len(self.shared_matrix):
            return [], START
        ids = self.shared_matrix[token].tolist()
        if ids[-1] == UNKNOWN:
            ids = ids[: ids.index(UNKNOWN)]
        return ids, self.shared_kind.item(token)

    def _grow(self, root: int, budget: int) -> Draft:
        """Add the most likely node repeatedly. A node enters the queue when its parent or likelier sibling is added."""
        k = self.k
        rows: dict[int, tuple[list[int], int]] = {}
        tokens: list[int] = []
        parents: list[int] = []
        buckets: list[int] = []
        queue: list[tuple[float, int, int, int, float, tuple[list[int], int]]] = []
        entries = 0
        token, node, path = root, ROOT, 1.0
        while True:
            row = rows.get(token)
            if row is None:
                row = rows[token] = self._successors(token)
            if row[0]:
                entries += 1
                heappush(queue, (-path * self.shared_probability[row[1]][0], entries, 0, node, path, row))
            if not queue or len(tokens) == budget:
                return Draft.of(tokens, parents, buckets)
            negative, _, rank, parent, parent_path, row = heappop(queue)
            ids, kind = row
            token, node, path = ids[rank], len(tokens), -negative
            tokens.append(token)
            parents.append(parent)
            buckets.append(kind * k + rank)
            rank += 1
            if rank < len(ids):
                entries += 1
                likely = -parent_path * self.shared_probability[kind][rank]
                heappush(queue, (likely, entries, rank, parent, parent_path, row))

    def _fill(self, root: int, budget: int) -> Draft:
        """The part of the paper's tree whose rows are known, cut to the most likely nodes if it exceeds the budget."""
        tokens: list[int] = []
        parents: list[int] = []
        buckets: list[int] = []
        node_of: list[int] = []
        rows: list[tuple[list[int], int]] = []
        nothing: tuple[list[int], int] = ([], START)
        root_row = self._successors(root)
        for parent, rank in _PAPER_NODES:
            ids, kind = root_row if parent == ROOT else rows[parent]
            if rank >= len(ids):
                node_of.append(ROOT)
                rows.append(nothing)
                continue
            token = ids[rank]
            node_of.append(len(tokens))
            rows.append(self._successors(token))
            tokens.append(token)
            parents.append(ROOT if parent == ROOT else node_of[parent])
            buckets.append(kind * self.k + rank)
        draft = Draft.of(tokens, parents, buckets)
        if len(tokens) <= budget:
            return draft
        flat = [p for line in self.shared_probability for p in line]
        return draft.select(likeliest(parents, [flat[bucket] for bucket in buckets], budget))

    # -- learning ------------------------------------------------------------------------------------------------

    def _reserve(self, highest: int) -> None:
        """Grow the matrix to hold ids up to `highest`."""
        size = len(self.shared_matrix)
        if highest >= size:
            more = (1 << max(10, highest.bit_length())) - size
            rows = np.full((more, self.k), UNKNOWN, dtype=np.int32)
            self.shared_matrix = np.concatenate((self.shared_matrix, rows))
            self.shared_kind = np.concatenate((self.shared_kind, np.full(more, START, dtype=np.int8)))

    def _fill_unknown_rows(self, prompt: IntArray) -> None:
        """Fill each unknown row with the successors of its token in the prompt, the latest first."""
        unseen = (self.shared_matrix[prompt[:-1], 0] == UNKNOWN).nonzero()[0][::-1]
        if not len(unseen):
            return
        pairs, latest = np.unique((prompt[unseen].astype(np.int64) << 32) | prompt[unseen + 1], return_index=True)
        tokens = pairs >> 32
        order = np.lexsort((latest, tokens))
        tokens, followers = tokens[order], pairs[order] & 0xFFFFFFFF
        ranks = np.arange(len(tokens)) - np.searchsorted(tokens, tokens)
        kept = ranks < self.k
        self.shared_matrix[tokens[kept], ranks[kept]] = followers[kept]

    def _put_first(self, token: int, follower: int) -> None:
        """Move `follower` to the front of the row of `token`; if it is new, the last id is dropped."""
        row = self.shared_matrix[token].tolist()
        if row[0] == follower:
            return
        if follower in row:
            row.remove(follower)
        else:
            row.pop()
        self.shared_matrix[token] = [follower, *row]

    def _overwrite(self, last: int, step: Step, topk: IntArray) -> None:
        """Store the top ids after every verified token; for one verified twice, those of the last accepted node."""
        tokens = np.concatenate((np.array([last], dtype=np.int32), step.draft.tokens))
        rows = self._fit(topk)
        self.shared_matrix[tokens] = rows
        kept = [0, *(node + 1 for node in step.accepted)]
        self.shared_matrix[tokens[kept]] = rows[kept]
        self.shared_kind[tokens] |= ROW

    def _fit(self, topk: IntArray) -> IntArray:
        """Rows of k ids; fewer were read if only proposers that require fewer were asked."""
        rows = topk[:, : self.k]
        if rows.shape[1] < self.k:
            rows = np.pad(rows, ((0, 0), (0, self.k - rows.shape[1])), constant_values=UNKNOWN)
        return rows

    def _put_first_pairs(self, before: IntArray, after: IntArray) -> None:
        """`_put_first` for many pairs; if several have the same first token, the latest one counts."""
        rows = self.shared_matrix[before]
        same = rows == after[:, None]
        place = np.where(same.any(axis=1), same.argmax(axis=1), self.k - 1)
        shifted = np.concatenate((after[:, None], rows[:, :-1]), axis=1)
        self.shared_matrix[before] = np.where(np.arange(self.k) <= place[:, None], shifted, rows)

    def _score_pairs(self, before: IntArray, after: IntArray) -> None:
        """`_score` for many pairs at once; the counter of a token that is first in several of them moves once."""
        rows = self.shared_matrix[before]
        known = rows[:, 0] != UNKNOWN
        if not known.any():
            return
        before, after, rows = before[known], after[known], rows[known]
        same = rows == after[:, None]
        right, rank, kinds = same.any(axis=1), same.argmax(axis=1), self.shared_kind[before]
        ranks = np.bincount(kinds[right] * np.int64(self.k) + rank[right], minlength=2 * COUNTS * self.k)
        total = np.bincount(kinds, minlength=2 * COUNTS)
        for kind in total.nonzero()[0].tolist():
            kept, share = (1 - RATE) ** int(total[kind]), 1 - (1 - RATE) ** int(total[kind])
            found = (ranks[kind * self.k : (kind + 1) * self.k] / total[kind]).tolist()
            line = self.shared_probability[kind]
            self.shared_probability[kind] = [kept * p + share * f for p, f in zip(line, found, strict=True)]
        count = kinds % COUNTS
        moved = np.where(right & (rank == 0), np.minimum(count + 1, COUNTS - 1), np.maximum(count - 1, 0))
        self.shared_kind[before] = (kinds - count + moved).astype(np.int8)

    def _score(self, last: int, emitted: Sequence[int]) -> None:
        """Count at which rank each emitted token is in its predecessor's row, before the row is changed."""
        token = last
        for follower in emitted:
            ids, kind = self._successors(token)
            if ids:
                rank = ids.index(follower) if follower in ids else UNKNOWN
                line = [p - RATE * p for p in self.shared_probability[kind]]
                if rank != UNKNOWN:
                    line[rank] += RATE
                self.shared_probability[kind] = line
                count = kind % COUNTS
                count = min(COUNTS - 1, count + 1) if rank == 0 else max(0, count - 1)
                self.shared_kind[token] = kind - kind % COUNTS + count
            token = follower
