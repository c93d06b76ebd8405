"""Applies the number of threads that fits the free cores to a target, its drafters and its costs, before a pass."""

from __future__ import annotations

from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.drafters.opening import Drafters
from specplug.engines.llama_cpp.pass_costs import PassCosts
from specplug.engines.llama_cpp.thread_count import ThreadCount
from specplug.planning.speculator import Speculator
from specplug.profile import Runtime


def thread_count(runtime: Runtime) -> ThreadCount:
    """The free cores for passes of `runtime`, whose threads are known."""
    assert runtime.threads is not None, "the profile was not resolved"
    return ThreadCount(max(runtime.threads, runtime.threads_batch or 0))


def threads_now(count: ThreadCount | None, runtime: Runtime) -> tuple[int, int]:
    """The threads of passes over one row and over several now; those of `runtime` where free cores are not followed."""
    assert runtime.threads is not None, "the profile was not resolved"
    threads, batch = runtime.threads, runtime.threads_batch or runtime.threads
    return (threads, batch) if count is None else (min(threads, count.now), min(batch, count.now))


def follow(
    count: ThreadCount,
    runtime: Runtime,
    context: Context,
    drafters: Drafters,
    costs: PassCosts,
    speculator: Speculator,
) -> None:
    """Where the free cores have changed, compute with as many threads and plan with their costs."""
    if count.changed():
        threads, batch = threads_now(count, runtime)
        context.use_threads(threads, batch)
        drafters.use_threads(threads)
        speculator.use_cost(costs.curve(threads, batch))
