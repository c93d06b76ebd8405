"""The class that vLLM drafts with while its passes are timed: guesses of every length in turn, right or wrong.

Knows nothing but lengths and a clock. What a pass costs does not depend on what is guessed: rejected guesses cost what
accepted ones do.
"""

from __future__ import annotations

import json
from time import perf_counter
from typing import Any

import numpy.typing as npt

KEY = "specplug_sweep"
"""Ours in `additional_config`: the file that passes are written to."""


class SweepProposer:
    """Asks for 0, 1, … k guesses per sequence in turn, and writes down what each pass took.

    One JSON line per pass: sequences, guesses for each, tokens in their caches on average, milliseconds from the end of
    one step's drafting to the beginning of the next, scheduling and sampling included. Passes that read a prompt, and
    those before which the batch changed, are left out.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._k: int = vllm_config.speculative_config.num_speculative_tokens
        self._path: str = vllm_config.additional_config[KEY]
        self._num_tokens: int = vllm_config.model_config.get_vocab_size()
        self._length = 0
        self._sequences = 0
        self._returned = 0.0
        self._lines: list[str] = []

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM; there is nothing to load."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: npt.NDArray[Any],
        token_ids_cpu: npt.NDArray[Any],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        now = perf_counter()
        n = len(sampled_token_ids)
        lengths = num_tokens_no_spec[:n]
        if n == self._sequences and all(sampled_token_ids):
            context, ms = float(lengths.mean()), (now - self._returned) * 1000
            self._lines.append(json.dumps([n, self._length, context, ms]))
            if len(self._lines) > self._k:  # a whole round: little is written, and little is lost
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write("\n".join(self._lines) + "\n")
                self._lines = []
        self._sequences = n if all(sampled_token_ids) else 0
        self._length = (self._length + 1) % (self._k + 1)
        last = token_ids_cpu[range(n), lengths - 1].tolist()
        drafts = [[(token + 1) % self._num_tokens] * self._length for token in last]  # hardly ever right
        self._returned = perf_counter()
        return drafts
