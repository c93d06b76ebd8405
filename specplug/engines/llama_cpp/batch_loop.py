"""The batch loop: prompts in pieces and running sequences in one target pass, streams coming and going at every step.

Knows slots, trees in a batch and which rows belong to prompts. Knows neither text, nor queues, nor who asks.
Cells are kept in order (cells.py), so that each stream's text is that of its single run, wherever passes of all shapes
round alike (q8_0 and q4_0 weights with a bf16 cache). `loop.py` is the loop for one sequence in a context of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from specplug.core import Draft, IntArray, Step
from specplug.engines.llama_cpp.cells import Cells
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.loop import Running, common_prefix, draw_alike, emit, rows_of, walk
from specplug.engines.llama_cpp.prefill_budget import PrefillBudget
from specplug.engines.llama_cpp.prefill_order import shares
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.engines.llama_cpp.tree_batch import Tree, lay_out
from specplug.errors import SpecplugError
from specplug.generation.answers import TokenLogprobs
from specplug.generation.counters import Counters
from specplug.generation.topk import top_ids
from specplug.planning.speculator import Speculator

PLACES = 16
"""Places in a draft that acceptance is counted for; later ones count as the last."""

WORTH_WAITING = 64
"""Tokens of a common beginning for which a prompt waits until another one is read."""


@dataclass(slots=True, eq=False)
class Stream:
    """One sequence from its prompt (int32[n]) to its last token.

    running    what the last step emitted, and whether it was the last
    max_draft  most guesses in a step
    cached     tokens of the prompt that were in the cache already
    guessers   the proposer, by index, of each guess that came true in the last step
    failure    why it ends without having finished
    decode_ms  of the steps without pieces of prompts; what they would have taken for the same tokens in plain decoding,
               by the cost curve, is in `plain_ms`
    """

    prompt: IntArray
    running: Running
    max_draft: int
    cached: int
    began_ns: int
    reading: bool = True
    guessers: list[int] = field(default_factory=list)
    failure: SpecplugError | None = None
    decode_ms: float = 0.0
    plain_ms: float = 0.0

    @property
    def fresh(self) -> list[int]:
        return self.running.fresh

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return self.running.logprobs

    @property
    def finish(self) -> str | None:
        return self.running.finish

    @property
    def counters(self) -> Counters:
        return self.running.counters


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a prompt in the batch of the pass under way; `last` where the prompt ends with them."""

    stream: Stream
    tokens: IntArray
    first: int
    last: bool


class BatchLoop:
    """Runs up to `slots` streams on an empty context with `batch_ids_needed` sequence ids."""

    def __init__(self, context: Context, speculator: Speculator, *, slots: int) -> None:
        self.context = context
        self.speculator = speculator
        self.slots = slots
        self.cells = Cells(context, slots=slots, junk_id=slots)
        self.prefill_budget = PrefillBudget()
        self._leaf_ids = range(slots + 1, batch_ids_needed(slots, speculator.planner.max_nodes))
        self._free: list[int] = list(range(slots))
        """Slots without a stream, the one that was left longest ago first."""
        num_sources = len(speculator.fusion.sources)
        self.guessed: npt.NDArray[np.int64] = np.zeros((num_sources, PLACES), dtype=np.int64)
        """Guesses that were verified, by proposer and by place in the draft."""
        self.accepted: npt.NDArray[np.int64] = np.zeros((num_sources, PLACES), dtype=np.int64)
        self.decode_ms = 0.0
        """Of all steps without pieces of prompts."""
        self.plain_ms = 0.0
        """What plain decoding would have taken for the same tokens, by the cost curve."""

    # -- life of a stream -----------------------------------------------------------------------------------------

    def begin(self, prompt: IntArray, sampler: Sampler, max_tokens: int, max_draft: int) -> Stream:
        """Give a prompt (int32[n], n >= 1) a slot, and what any slot already holds of its beginning.

        One slot must be free. The stream owns the sampler from now on.
        """
        began = perf_counter_ns()
        seq, cached = self._home(prompt)
        running = Running(seq, sampler, self.context.model.end_tokens, 0, cached, max_tokens)
        running.counters.prompt_tokens = len(prompt)
        return Stream(prompt, running, max_draft, cached, began)

    def shares_more_later(self, prompt: IntArray, reading: Sequence[Stream]) -> bool:
        """Whether a prompt had better wait for those that are being read, since it begins as one of them does."""
        coming = max((common_prefix(s.prompt, prompt) for s in reading), default=0)
        if coming < WORTH_WAITING:
            return False
        return coming - max(common_prefix(held, prompt) for held in self.cells.tokens) >= WORTH_WAITING

    def finish(self, stream: Stream) -> None:
        """Give the slot back, at any time between two steps; what it holds stays for a prompt that begins alike."""
        running = stream.running
        assert running.sampler is not None
        running.sampler.close()
        if not stream.reading:
            self.speculator.end(running.seq)
        self._free.append(running.seq)

    def reset(self) -> None:
        """Forget what the cache holds: after a pass that failed nothing in it is sure. No stream may be under way."""
        self.cells.reset()

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self, running: Sequence[Stream], reading: Sequence[Stream]) -> None:
        """One target pass: drafts of `running` streams, and pieces of the prompts of `reading` ones, in this order.

        Each stream that runs afterwards has at least one token in `fresh`, or a `failure`. Raises SpecplugError where
        the pass itself fails; then every stream is lost.
        """
        began = perf_counter_ns()
        drafts = self._plan(running)
        # Rows of trees come first, all with logits, then the last row of each prompt that ends here.
        tree_rows = len(running) + sum(map(len, drafts))
        room = self.context.num_batch - tree_rows
        pieces = self._pieces(
            reading, min(room, self.prefill_budget.rows(len(running), tree_rows)) if running else room
        )
        piece_rows = sum(length for _, length in pieces)
        self.cells.make_room(tree_rows + piece_rows, self._free)
        self.context.clear_batch()
        leaf_ids = iter(self._leaf_ids)
        trees = [
            lay_out(self.context, draft, s.running.root, s.running.position, s.running.seq, leaf_ids)
            for s, draft in zip(running, drafts, strict=True)
        ]
        added = [self._add(stream, length) for stream, length in pieces]
        drafted = perf_counter_ns()
        self.context.decode()
        logits = self.context.logits(tree_rows + sum(piece.last for piece in added))
        decoded = perf_counter_ns()
        for stream, tree in zip(running, trees, strict=True):
            self._verify(stream, tree, logits)
        self._keep(running, trees, added)
        verified = perf_counter_ns()
        self._learn(running, trees, logits[:tree_rows], None if added else (decoded - drafted) / 1e6)
        self._follow(added, logits, tree_rows)
        ended = perf_counter_ns()
        if running:
            self.prefill_budget.observe(len(running), tree_rows, piece_rows, (ended - began) / 1e6)
        if running and not added:
            self._compare(running, (ended - began) / 1e6)
        for stream, tree in zip(running, trees, strict=True):
            c = stream.counters
            c.steps += 1
            c.emitted_tokens += len(stream.fresh)
            c.draft_tokens += len(tree.draft)
            c.accepted_tokens += len(tree.accepted)
            c.target_ns += (decoded - drafted) // len(running)
            c.sample_ns += (verified - decoded) // len(running)
            c.draft_ns += (drafted - began + ended - verified) // len(running)

    # -- parts of a step ------------------------------------------------------------------------------------------

    def _home(self, prompt: IntArray) -> tuple[int, int]:
        """A free slot for a prompt, and how many of its tokens that slot now holds."""
        # The last token is always evaluated anew: its logits are needed.
        shared = [min(common_prefix(held, prompt), len(prompt) - 1) for held in self.cells.tokens]
        best = max(range(self.slots), key=lambda seq: (shared[seq], seq in self._free))
        length = shared[best]
        if best in self._free and (2 * length >= len(self.cells.tokens[best]) or len(self._free) == 1):
            seq = best
            self.cells.truncate(seq, length)
        else:  # somebody uses it, or most of it belongs to another conversation
            seq = next(seq for seq in self._free if seq != best)
            self.cells.truncate(seq)
            if length:
                self.cells.share(best, seq, length)
        self._free.remove(seq)
        return seq, length

    def _plan(self, running: Sequence[Stream]) -> list[Draft]:
        if not running:
            return []
        fill = sum(s.running.position for s in running) // len(running)
        # A draft of n nodes can emit n + 1 tokens: never draft past the limit.
        budgets = [min(s.running.left - 1, s.max_draft) for s in running]
        remaining = [s.running.left for s in running]
        return self.speculator.plan([s.running.seq for s in running], fill, budgets, remaining)

    def _compare(self, running: Sequence[Stream], ms: float) -> None:
        """Count a step of `ms`, and what plain decoding would have taken for what it brought."""
        fill = sum(s.running.position for s in running) // len(running)
        plain_ms = self.speculator.cost.at(fill)[min(len(running), self.speculator.cost.limit) - 1]
        for stream in running:
            stream.decode_ms += ms
            stream.plain_ms += plain_ms * len(stream.fresh)
        self.decode_ms += ms
        self.plain_ms += plain_ms * sum(len(stream.fresh) for stream in running) / len(running)

    def _pieces(self, reading: Sequence[Stream], room: int) -> list[tuple[Stream, int]]:
        """The prompts that get rows, and how many."""
        left = [len(stream.prompt) - stream.running.position for stream in reading]
        return [(stream, rows) for stream, rows in zip(reading, shares(left, room), strict=True) if rows]

    def _add(self, stream: Stream, length: int) -> Piece:
        at, first = stream.running.position, self.context.rows
        tokens = stream.prompt[at : at + length]
        last = at + length == len(stream.prompt)
        self.context.add_span(tokens, at, stream.running.seq, wanted=False, last=last)
        return Piece(stream, tokens, first, last)

    def _verify(self, stream: Stream, tree: Tree, logits: Logits) -> None:
        running = stream.running
        try:
            walk(self.context, running, tree, logits)
        except SpecplugError as error:  # its own sampler's: the others go on
            stream.failure = error
        owners = self.speculator.fusion.bucket_source
        draft, accepted = tree.draft, tree.accepted
        stream.guessers = []
        if not len(draft):
            return
        sources, places = owners[draft.buckets], np.minimum(draft.depths(), PLACES) - 1
        np.add.at(self.guessed, (sources, places), 1)
        np.add.at(self.accepted, (sources[accepted], places[accepted]), 1)
        stream.guessers = sources[accepted].tolist()

    def _keep(self, running: Sequence[Stream], trees: Sequence[Tree], pieces: Sequence[Piece]) -> None:
        """The cache keeps roots, accepted nodes and prompts; cells before the last one kept stay taken."""
        kept = 0
        for tree in trees:
            kept = max(kept, tree.first + 1, *(tree.row_of[node] + 1 for node in tree.accepted))
        if pieces:
            kept = self.context.rows
        for stream, tree in zip(running, trees, strict=True):
            self._keep_branch(stream.running, tree, kept)
        for piece in pieces:
            rows = range(piece.first, piece.first + len(piece.tokens))
            self.cells.took(piece.stream.running.seq, piece.tokens.tolist(), rows)
            piece.stream.running.position += len(piece.tokens)
        self.cells.passed(kept)

    def _keep_branch(self, r: Running, tree: Tree, kept: int) -> None:
        """Home keeps the root and the accepted nodes; other cells of rows before `kept` go to the junk."""
        context, draft, accepted = self.context, tree.draft, tree.accepted
        start = r.position + 1
        stop = start + len(accepted)
        tokens = [r.root, *draft.tokens[accepted].tolist()]
        self.cells.took(r.seq, tokens, [tree.first, *(tree.row_of[node] for node in accepted)])
        if len(draft) > len(accepted):
            for node, depth in enumerate(draft.depths().tolist()):
                if tree.row_of[node] < kept and node not in accepted:
                    self.cells.junk(tree.leaf_of[node], r.position + depth, r.position + depth + 1)
            winner = tree.leaf_of[accepted[-1]] if accepted else r.seq
            if winner == r.seq:
                context.drop(r.seq, stop)
            else:
                shared = start + sum(tree.leaf_of[node] == r.seq for node in accepted)
                context.drop(r.seq, shared)
                context.copy(winner, r.seq, shared, stop)
            for leaf in tree.extra:
                context.drop(leaf)
        r.position = stop
        if r.fresh:
            r.root = r.fresh[-1]

    def _learn(self, running: Sequence[Stream], trees: Sequence[Tree], logits: Logits, target_ms: float | None) -> None:
        if not running:
            return
        speculator = self.speculator
        began = perf_counter_ns()
        topk = top_ids(logits, speculator.wants_topk) if speculator.wants_topk else None
        topk_ns = perf_counter_ns() - began
        # A stream that failed may have emitted nothing; it is about to be forgotten, so any token will do.
        steps = [
            Step(s.fresh or [0], tree.draft, tree.accepted, rows_of(topk, tree))
            for s, tree in zip(running, trees, strict=True)
        ]
        speculator.observe([s.running.seq for s in running], steps, target_ms=target_ms, topk_ns=topk_ns)

    def _follow(self, pieces: Sequence[Piece], logits: Logits, row: int) -> None:
        """Streams whose prompts are read emit their first token, from `row` of the logits on, and run from now on."""
        for piece in pieces:
            if not piece.last:
                continue
            stream, running = piece.stream, piece.stream.running
            running.fresh, running.logprobs = [], []
            try:
                running.root = emit(self.context, running, logits, row)
            except SpecplugError as error:
                stream.failure = error
            row += 1
            stream.reading = False
            self.speculator.begin(running.seq, np.append(stream.prompt, np.int32(running.root)))
            draw_alike(self.speculator, running)
            running.counters.prompt_ns = perf_counter_ns() - stream.began_ns


def batch_ids_needed(slots: int, max_nodes: int) -> int:
    """Sequence ids for `slots` homes, the junk, and as many leaves as a plan can have."""
    return slots + 1 + max_nodes
