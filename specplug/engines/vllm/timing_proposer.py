"""The class that vLLM drafts with while its passes are timed. It drafts each length in turn.

The tokens do not matter: a rejected draft token costs as much as an accepted one.
"""

from __future__ import annotations

import json
from time import perf_counter
from typing import Any

import numpy.typing as npt

KEY = "specplug_sweep"
"""The key in `additional_config` for the file that timings are written to."""


class TimingProposer:
    """Drafts 0, 1, … k tokens per sequence in turn, and writes the time of each pass to a file.

    One JSON line per pass: sequences, draft tokens per sequence, mean tokens per sequence in the KV cache, and
    milliseconds.
    The time runs from the end of one step's drafting to the start of the next, so it includes scheduling and sampling.
    Passes that read a prompt, and passes before which the batch changed, are left out.
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
            if len(self._lines) > self._k:  # once per round, so that few writes happen and few lines can be lost
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write("\n".join(self._lines) + "\n")
                self._lines = []
        self._sequences = n if all(sampled_token_ids) else 0
        self._length = (self._length + 1) % (self._k + 1)
        last = token_ids_cpu[range(n), lengths - 1].tolist()
        drafts = [[(token + 1) % self._num_tokens] * self._length for token in last]  # almost always rejected
        self._returned = perf_counter()
        return drafts
