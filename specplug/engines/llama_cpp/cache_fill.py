"""Fills a KV cache by copying a few cells many times, which takes milliseconds where reading takes minutes.

Only the time of passes over such a cache is meaningful, since every stretch of it holds the same keys and values.
Source: the layout of sequence states in llama.cpp's src/llama-kv-cache.cpp (`state_write_meta`): for each cell its
position, the number of its sequences, and their ids. The layout is looked for, not assumed: where it is not found, and
in models with a recurrent state, the cache is filled by reading.
"""

from __future__ import annotations

import llama_cpp.llama_cpp as ll
import numpy as np

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.model import captured_log
from specplug.errors import SpecplugError

STRETCH = 16
"""Tokens that are read, and then copied."""


class CacheFill:
    """Extends the sequences of one context; the last sequence id of the context is used for copying.

    sequences  sequence ids that are filled, from 0 on; where the context has no further one, all are read
    """

    def __init__(self, context: Context, sequences: int = 1) -> None:
        self.context = context
        self._copies = context.num_ids > sequences and not context.model.has_recurrent_memory
        self._state: bytes | None = None
        self._tables: list[int] = []

    def extend(self, sequence: int, start: int, stop: int) -> None:
        """Extend a sequence of `start` tokens to `stop` tokens; the context must be empty before the first call."""
        at = start
        spare = self.context.num_ids - 1
        if self._copies and start == 0 and self._state is None and stop > STRETCH:
            self._read(sequence, 0, STRETCH)
            self._state = self.context.state(sequence)
            self._tables = _tables(self._state, sequence)
            at = STRETCH
        if self._tables:
            while at < stop and self._copy(sequence, spare, at, stop):
                at = min(at + STRETCH, stop)
        self._read(sequence, at, stop)

    def _read(self, sequence: int, start: int, stop: int) -> None:
        context = self.context
        for at in range(start, stop, context.num_batch):
            span = hashed_tokens(at, min(at + context.num_batch, stop), context.model.num_tokens)
            context.clear_batch()
            context.add_span(span, at, sequence, wanted=False, last=True)
            context.decode()

    def _copy(self, sequence: int, spare: int, start: int, stop: int) -> bool:
        """Append a copy of the stretch at positions [start, start + STRETCH); False where llama.cpp refuses."""
        assert self._state is not None
        state = bytearray(self._state)
        for table in self._tables:
            cells = np.frombuffer(state, dtype=np.int32, count=3 * STRETCH, offset=table)
            cells[::3] += start
        try:
            with captured_log():
                self.context.restore(spare, bytes(state))
        except SpecplugError:
            self._tables = []
            return False
        self.context.copy(spare, sequence)
        self.context.drop(spare)
        end = int(ll.llama_memory_seq_pos_max(self.context.memory, sequence)) + 1
        if end != start + STRETCH:
            raise SpecplugError(f"llama.cpp placed {end - start} copied cells instead of {STRETCH}")
        if end > stop:
            self.context.drop(sequence, stop)
        return True


def _tables(state: bytes, sequence: int) -> list[int]:
    """The offsets in the state of a sequence at which the cells of positions 0, 1, ... are listed."""
    table = np.zeros((STRETCH, 3), dtype=np.int32)
    table[:, 0] = np.arange(STRETCH)
    table[:, 1] = 1
    table[:, 2] = sequence
    wanted, found, at = table.tobytes(), [], 0
    while (at := state.find(wanted, at)) >= 0:
        found.append(at)
        at += len(wanted)
    return found


def hashed_tokens(start: int, stop: int, num_tokens: int) -> IntArray:
    """Arbitrary tokens, the same in every run: a multiplicative hash of the position."""
    ids = (np.arange(start, stop, dtype=np.int64) * 2654435761 & 0x7FFFFFFF) % num_tokens
    return ids.astype(np.int32)
