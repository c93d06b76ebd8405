"""Changes, between requests, how many draft tokens vLLM's scheduler schedules by batch size.

The engine must have been opened with `num_speculative_tokens_per_batch_size`. Source: vllm/v1/core/sched/scheduler.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from specplug.planning.batch_size_schedule import Range, length_at

METHOD = "specplug_use_lengths"
"""The method that is added to vLLM's `EngineCore`, so that clients in other processes can call it."""

CORE = "vllm.v1.engine.core"


def install() -> None:
    """Add METHOD in the process that has the scheduler. Calling it again changes nothing."""
    core: Any = sys.modules.get(CORE)
    if core is not None:
        setattr(core.EngineCore, METHOD, _use_lengths)


def use_lengths(llm: Any, ranges: Iterable[Range]) -> None:
    """Verify this many draft tokens per sequence from now on. Call it only while no request is running.

    llm  a `vllm.LLM`, whose scheduler may be in another process
    """
    client, plain = llm.llm_engine.engine_core, [list(one) for one in ranges]
    if hasattr(client, "call_utility"):
        client.call_utility(METHOD, plain)
    else:
        _use_lengths(client.engine_core, plain)


def _use_lengths(core: Any, ranges: list[Any]) -> None:
    scheduler = core.scheduler
    sizes = range(len(scheduler.dynamic_sd_lookup))
    scheduler.dynamic_sd_lookup = [length_at(ranges, size) for size in sizes]
