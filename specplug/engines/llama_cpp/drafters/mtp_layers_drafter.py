"""Drafts with several MTP layers, each at the depth for which it was trained.

Knows which entries each layer has read. Where the target's states come from is the base class's.
Source: the driver of several MTP layers in llama.cpp (common/speculative.cpp), which reads a text with every layer by
the target's states, and hands the state that a layer gives to the next one. Unlike there, a layer has a context of its
own, so that its cells stay where they are while others read; it reads when its depth is reached; and the last layer
drafts on beyond its depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.drafters.chain import Chain
from specplug.engines.llama_cpp.drafters.head_context import HeadContext
from specplug.engines.llama_cpp.drafters.head_drafter import READ_WITH_ROOT, EvaluatedPart, HeadLimits
from specplug.engines.llama_cpp.drafters.head_text import HeadText
from specplug.engines.llama_cpp.drafters.mtp_drafter import MtpDrafter
from specplug.engines.llama_cpp.drafters.state_history import States


class MtpLayersDrafter(MtpDrafter):
    """Layer i drafts the token at depth i, the last layer also those beyond.

    State: as MtpDrafter, with cells for every layer. Cost per draft token: a pass of one layer and the output matrix;
    the pass has rows for the draft tokens before, too, and for what the layer has not read of the text.
    """

    def __init__(
        self,
        contexts: Sequence[HeadContext],
        target: Context,
        ids: IntArray | None = None,
        **limits: Unpack[HeadLimits],
    ) -> None:
        """`contexts` are those of the layers, in order; `ids` as in the base class."""
        super().__init__(contexts[0], target, ids, **limits)
        self._cells = LayersCells(contexts, limits["slots"])
        self._heads = [HeadText(self._cells, slot, self._layout) for slot in range(limits["slots"])]
        self._handed: dict[int, list[States]] = {}
        """float32[1, width] each: the states of the draft tokens of a sequence, given by the layers before."""

    def forget(self) -> None:
        super().forget()
        self._cells.clear()

    def use_threads(self, threads: int) -> None:
        for context in self._cells.contexts:
            context.use_threads(threads)

    def close(self) -> None:
        for context in self._cells.contexts:
            context.close()

    def _read_arbitrary(self, rows: int) -> float:
        return len(self._cells.contexts) * super()._read_arbitrary(rows)

    def _read_entries(self, seq: int, first: int, stop: int) -> None:
        super()._read_entries(seq, first, stop)
        for layer in range(1, len(self._cells.contexts)):
            self._follow(layer, seq, stop)

    def _go_on(self, chains: Sequence[Chain]) -> Logits:
        depth = len(chains[0].path)  # as of all chains: each pass makes each of them longer by one token
        layer = min(depth, len(self._cells.contexts) - 1)
        context = self._cells.contexts[layer]
        room = min(READ_WITH_ROOT, context.num_batch // len(chains) - depth)
        parts: list[EvaluatedPart] = []
        for chain in chains:
            seq, head, text = chain.seq, self._heads[chain.seq], self._texts[chain.seq]
            handed = self._handed.setdefault(seq, [])
            del handed[depth - 1 :]
            handed.append(self._own[seq])
            if depth > layer:  # the last layer has read all but the last draft token
                parts.append((seq, text.drafted[-1:], handed[-1], head.stored + depth - 1))
                continue
            self._follow(layer, seq, head.stored - room)
            first = self._read_by(layer, seq)
            states = np.concatenate([head.states(first, head.stored), *handed])
            parts.append((seq, text.tokens[first : head.stored] + text.drafted, states, first))
        logits = self._evaluate(parts, context=context)
        if depth == layer:
            for chain in chains:
                self._cells.add_read(layer, chain.seq, self._heads[chain.seq].stored)
        return logits

    def _read_by(self, layer: int, seq: int) -> int:
        """The entries of a text before this one are in the cells of a layer after the first."""
        return max(self._heads[seq].first, self._cells.read[layer][seq])

    def _follow(self, layer: int, seq: int, stop: int) -> None:
        """Read the entries of a text before `stop` with a layer after the first, without logits."""
        context, head, text = self._cells.contexts[layer], self._heads[seq], self._texts[seq].tokens
        while (first := self._read_by(layer, seq)) < stop:
            end = min(stop, first + context.num_batch)
            self._evaluate([(seq, text[first:end], head.states(first, end), first)], wanted=False, context=context)
            self._cells.add_read(layer, seq, end)


class LayersCells:
    """The cells of all layers. What is removed or shared, is so in each of them.

    read  of each layer but the first and each slot: the entries before this one are in its cells, up to where a text
          begins that is not known from its first token on
    """

    def __init__(self, contexts: Sequence[HeadContext], slots: int) -> None:
        self.contexts = tuple(contexts)
        self.read = [[0] * slots for _ in contexts]

    def add_read(self, layer: int, seq: int, stop: int) -> None:
        self.read[layer][seq] = stop

    def clear(self) -> None:
        for context, read in zip(self.contexts, self.read, strict=True):
            context.clear()
            read[:] = [0] * len(read)

    def drop(self, seq_id: int, start: int = -1, stop: int = -1) -> None:
        for context, read in zip(self.contexts, self.read, strict=True):
            context.drop(seq_id, start, stop)
            read[seq_id] = min(read[seq_id], max(0, start))  # an entry of an MTP layer is at the position of its number

    def copy(self, source: int, target: int, start: int = -1, stop: int = -1) -> None:
        for context, read in zip(self.contexts, self.read, strict=True):
            context.copy(source, target, start, stop)
            read[target] = min(read[source], stop)
