"""Target passes driven by hand, which hand their hidden states to a head: chains, accepted up to a given place.

For targets with a recurrent state: llama.cpp keeps the states before the last rows of a pass, and every pass is one
sequence's, so that it is never divided. Knows no planner and no step loop.
"""

from time import perf_counter_ns

import llama_cpp.llama_cpp as ll
import numpy as np

from specplug.core import Draft, IntArray, Step
from specplug.engines.llama_cpp.context import Context, context_params
from specplug.engines.llama_cpp.drafters.head_drafter import HeadDrafter
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.stream import Pass, Piece, Stream
from specplug.engines.llama_cpp.tree_batch import Tree, lay_out
from specplug.profile import Runtime


def open_with_snapshots(model: Model, runtime: Runtime, *, slots: int, depth: int) -> Context:
    """A context in which up to `depth` rows of the last pass can be taken back."""
    params = context_params(model, runtime, cells=runtime.context, num_ids=slots, max_rows=depth + 1)
    params.n_rs_seq = depth
    handle = ll.llama_init_from_model(model.handle, params)
    assert handle and ll.llama_n_rs_seq(handle) == depth
    return Context(model, handle, num_ids=slots, max_rows=depth + 1)


class HandDriven:
    """Greedy texts of a target, of which `head` may draft tokens."""

    def __init__(self, target: Context, head: HeadDrafter | None = None) -> None:
        self.target = target
        self.head = head

    def begin(self, seq: int, prompt: IntArray, *, piece: int = 1 << 20) -> Stream:
        """Read a prompt in pieces; the stream has emitted its first token."""
        stream = Stream(seq, prompt, None, 1 << 20, 1 << 20, 0, perf_counter_ns())
        self.target.drop(seq)
        for at in range(0, len(prompt), piece):
            part = prompt[at : at + piece]
            self.target.clear_batch()
            self.target.add_span(part, at, seq, wanted=False, last=True)
            self.target.decode()
            logits = self.target.logits(1)
            stream.position += len(part)
            self._follow([], [], [Piece(stream, part, 0, at + len(part) == len(prompt))])
        stream.root = int(logits[0].argmax())
        stream.reading = False
        if self.head is not None:
            self.head.begin(seq, np.append(prompt, np.int32(stream.root)))
        return stream

    def step(self, stream: Stream, draft: Draft) -> list[int]:
        """Verify a chain; returns the emitted tokens."""
        context = self.target
        context.clear_batch()
        tree = lay_out(context, draft, stream.root, stream.position, stream.seq, iter(()))
        context.decode()
        logits = context.logits(1 + len(draft))
        fresh = [int(logits[0].argmax())]
        for node, token in enumerate(draft.tokens.tolist()):
            if token != fresh[-1]:
                break
            tree.accepted.append(node)
            fresh.append(int(logits[node + 1].argmax()))
        stream.position += len(fresh)
        if len(fresh) < 1 + len(draft):
            context.drop(stream.seq, stream.position)
        stream.root, stream.fresh = fresh[-1], fresh
        self._follow([stream], [tree], [])
        if self.head is not None:
            self.head.observe(stream.seq, Step(fresh, draft, tree.accepted))
        return fresh

    def _follow(self, running: list[Stream], trees: list[Tree], pieces: list[Piece]) -> None:
        if self.head is not None:
            logits = np.zeros((0, 0), dtype=np.float32)
            self.head.follow(Pass(running, trees, pieces, self.target.rows, logits, 0, 0, 0))
