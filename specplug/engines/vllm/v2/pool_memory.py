"""How many texts a pool of keys and values has room for, within a share of the memory that is free for vLLM's KV cache.

The pool is allocated after the weights are loaded and before vLLM measures what is left for its KV cache, so that it is
taken from it. Where the size of the KV cache is set (`--kv-cache-memory-bytes`), vLLM measures nothing, and the pool is
added to it.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from specplug.drafts.retrieval import Window
from specplug.errors import UsageError

MIB = 1 << 20


def rows_within(bytes_per_row: int, most: int, share: float, kv_bytes: int, window: Window) -> int:
    """The number of texts that have a row of the pool: at most `most`.

    share     of the memory for the KV cache, for all rows together
    kv_bytes  that memory on the rank that has least
    UsageError where not even one has.
    """
    rows = min(most, int(share * kv_bytes) // bytes_per_row)
    if rows < 1:
        raise UsageError(
            f"short_context: no room for the pool: {window.size} tokens of one text take {bytes_per_row / MIB:.1f} "
            f"MiB, and kv_share {share:g} of {kv_bytes / MIB:,.0f} MiB that are free for the KV cache is "
            f"{share * kv_bytes / MIB:.1f} MiB; raise kv_share, or make first, recent and retrieved smaller"
        )
    return rows


def in_words(rows: int, bytes_per_row: int, most: int, kv_bytes: int, is_measured: bool) -> str:
    """What the log says about the pool."""
    place = (
        "taken from what is free once the weights are loaded, before vLLM measures it for the KV cache"
        if is_measured
        else "beside the KV cache, whose size is set"
    )
    return (
        f"short_context: a pool of {rows * bytes_per_row / MIB:,.1f} MiB per rank, {place} "
        f"({kv_bytes / MIB:,.0f} MiB), for {rows} of at most {most} requests at once; others draft without it"
    )


def memory_for_kv(config: Any, device: Any) -> tuple[int, bool]:
    """Bytes for the KV cache with the weights loaded, the least of all ranks; and whether vLLM will measure them.

    config  vLLM's `VllmConfig`
    """
    cache = config.cache_config
    if cache.kv_cache_memory_bytes:
        return int(cache.kv_cache_memory_bytes), False
    share = cache.gpu_memory_utilization
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found = free - (1 - share) * total
    else:
        import psutil

        found = share * psutil.virtual_memory().total - psutil.Process(os.getpid()).memory_info().rss
    return _least_of_ranks(max(0, int(found))), True


def _least_of_ranks(number: int) -> int:
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return number
    least = torch.tensor(number)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return int(least)
