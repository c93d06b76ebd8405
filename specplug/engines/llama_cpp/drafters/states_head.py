"""Gives the logits of hidden states, by a norm and some rows of an output matrix that are a model of their own.

Works on a context without a text. Does not depend on where the states come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Logits, open_context
from specplug.engines.llama_cpp.drafters.state_history import States
from specplug.engines.llama_cpp.model import open_model
from specplug.errors import UsageError
from specplug.profile import Runtime


class GivenStates:
    """Hidden states as the input of a context, whose tokens are their numbers."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.states: States = np.zeros((0, width), dtype=np.float32)

    def rows(self, tokens: IntArray | Sequence[int]) -> npt.NDArray[np.float32]:
        taken: States = self.states[np.asarray(tokens)]
        return taken


class StatesHead:
    """A file that `gguf_states_head.write_norm_and_head` has written, opened."""

    def __init__(self, path: Path, runtime: Runtime, *, width: int, num_ids: int, max_rows: int) -> None:
        """
        width     numbers of a state
        num_ids   rows of the matrix
        max_rows  most states of one call
        UsageError where the file has other sizes, or llama.cpp cannot open it.
        """
        self._model = open_model(path, runtime)
        self._states = GivenStates(width)
        self.epsilon = float(self._model.meta("llama.attention.layer_norm_rms_epsilon") or 0.0)
        """That of the norm."""
        try:
            if self._model.width != width or self._model.num_tokens != num_ids:
                raise UsageError(f"{path}: made for another model; build the drafter again")
            self._context = open_context(
                self._model, runtime, cells=cells_of(max_rows), num_ids=1, max_rows=max_rows, inputs=self._states
            )
        except BaseException:
            self._model.close()
            raise

    def logits(self, states: States) -> Logits:
        """float32[n, num_ids]: those of float32[n, width] states; a view until the next call."""
        context, self._states.states = self._context, states
        context.clear()
        context.clear_batch()
        for at in range(len(states)):
            context.add_span((at,), at, 0, wanted=True)
        context.decode()
        return context.logits(len(states))

    def use_threads(self, threads: int) -> None:
        self._context.use_threads(threads)

    def close(self) -> None:
        self._context.close()
        self._model.close()


def cells_of(max_rows: int) -> int:
    """KV cells of a context that takes so many states at once."""
    return -(-max_rows // 256) * 256
