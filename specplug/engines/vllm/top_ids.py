"""Reads the target's most likely ids for the rows of one pass.

On a GPU, one top-k for the whole batch starts before sampling, and its copy to the host runs beside sampling. On a CPU,
where a row takes 15 us, only the requested rows are read, after sampling.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import Any

import torch

from specplug.core import IntArray, int_array
from specplug.generation.topk import top_ids


class TopIdsOfPass:
    """Top ids of `logits` (float[rows, V]), computed immediately or on request."""

    def __init__(self, logits: Any, k: int, *, greedy: bool) -> None:
        """greedy  sampling leaves the logits unchanged; otherwise penalties and cut-offs may be written into them"""
        self._k = k
        self._logits: Any = None
        self._ids: Any = None
        self._copied: Any = None
        if logits.device.type == "cpu":
            if greedy:
                self._logits = logits
            else:
                self._ids = top_ids(_as_float(logits), k)
            return
        ids = torch.topk(logits, k, dim=-1).indices.to(torch.int32)
        self._ids = torch.empty(ids.shape, dtype=torch.int32, pin_memory=True)
        self._ids.copy_(ids, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def rows(self, rows: IntArray, k: int) -> IntArray:
        """int32[len(rows), k]: the top ids of these rows; k is at most the k given to the constructor."""
        assert k <= self._k
        if self._logits is not None:
            return top_ids(_as_float(self._logits[torch.from_numpy(rows).long()]), k)
        if self._copied is not None:
            self._copied.synchronize()
            self._ids, self._copied = self._ids.numpy(), None
        return int_array(self._ids[rows, :k])


def time_reading(num_tokens: int, *, k: int = 8, rounds: int = 12) -> list[tuple[int, float]]:
    """Time reading the top k ids of 1, 2, 4 and 8 rows on the CPU, `rounds` times each: (rows, microseconds)."""
    sizes = (1, 2, 4, 8)
    logits = torch.randn(max(sizes), num_tokens)
    times = []
    for rows in sizes * rounds:
        began = perf_counter_ns()
        TopIdsOfPass(logits, k, greedy=True).rows(int_array(range(rows)), k)
        times.append((rows, (perf_counter_ns() - began) / 1000))
    return times


def _as_float(logits: Any) -> Any:
    return logits.float().numpy()
