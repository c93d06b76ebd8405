"""Measures what passes cost under different engine settings, and which settings round every pass alike.

Attention kernel and cache type decide both, and their effect depends on the model, the processor and the context
length. Does not depend on drafts, and changes no profile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter

import llama_cpp.llama_cpp as ll

from specplug.engines.llama_cpp.context import cache_bytes, open_context
from specplug.engines.llama_cpp.exact_passes import rows_that_agree
from specplug.engines.llama_cpp.measure import PassTimer
from specplug.engines.llama_cpp.model import Model
from specplug.errors import SpecplugError
from specplug.machine.memory import available_memory
from specplug.planning.request_time import ALL_ROWS, SettingCosts
from specplug.profile import Runtime

ROWS = (1, 2, 4, 8, 16)
"""Row counts that are timed."""

FIRST_ROWS = (1, 4)
"""Row counts that are timed first; a setting that loses at all of them is dropped."""

LOSES = 1.15
"""A setting is dropped when its passes take this many times as long as the fastest ones at the longest context."""

CHECKED_ROWS = (2, 4, 8, 16, ALL_ROWS)
"""Row counts whose logits are compared with those of passes of one row."""

ROUNDS = 5
"""Most rounds over all points."""

MEMORY_SHARE = 0.5
"""Settings whose caches would take more than this share of the free memory are left out."""


def stock(runtime: Runtime) -> Runtime:
    """The settings that llama.cpp takes where none is named, for the same context and threads."""
    return replace(runtime, flash_attention=True, kv_type="f16", ubatch=None, repack=True, mmap=True)


def can_offload() -> bool:
    """Whether the installed llama.cpp can compute layers on a GPU."""
    return bool(ll.llama_supports_gpu_offload())


def attention_settings(runtime: Runtime, *, quantised: bool = False) -> list[Runtime]:
    """Every combination of attention kernel and cache type that `runtime` leaves open, llama.cpp's own first.

    An f32 cache is not combined with flash attention, which would convert it to f16 in every pass.

    quantised  a q8_0 cache is among them; it keeps less of keys and values than 16 bits, so no choice is made for it
    """
    kernels = [True, False] if runtime.flash_attention is None else [runtime.flash_attention]
    types = ["f16", "bf16", "f32", *(["q8_0"] if quantised else [])] if runtime.kv_type is None else [runtime.kv_type]
    found = [
        replace(runtime, flash_attention=kernel, kv_type=kv_type)
        for kv_type in types
        for kernel in kernels
        if runtime.kv_type is not None or (not (kv_type == "f32" and kernel) and not (kv_type == "q8_0" and not kernel))
    ]
    return found or [replace(runtime, flash_attention=kernels[0], kv_type=types[0])]


@dataclass(slots=True)
class _Candidate:
    runtime: Runtime
    timer: PassTimer
    keep: bool
    ms: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    prompt_ms: dict[int, float] = field(default_factory=dict)
    equal_rows: int = 1

    def time(self, rows: int) -> None:
        self.ms.setdefault((self.timer.filled, rows), []).append(self.timer.time(rows))

    def at(self, context: int, rows: int) -> float:
        return median(self.ms[context, rows])


def measure_settings(
    models: Callable[[Runtime], Model],
    runtimes: Sequence[Runtime],
    contexts: Sequence[int],
    seconds: float,
    *,
    keep: Sequence[Runtime] = (),
    progress: Callable[[float], None] = lambda share: None,
    left_out: Callable[[Runtime, str], None] = lambda runtime, reason: None,
) -> dict[Runtime, SettingCosts]:
    """The costs of the settings that are not far slower than another one, in interleaved rounds.

    models    returns the model, opened with the settings for weights of a runtime
    contexts  tokens in the cache, ascending; caches are filled by copying
    keep      settings that are measured to the end even if they lose
    left_out  receives the settings that cannot be opened or whose caches do not fit into memory, and the reason

    The first round over the longest context, the comparison of roundings and one prompt pass are always made; further
    rounds until the time is over.
    """
    began = perf_counter()
    long = contexts[-1]
    cells = -(-(long + max(ROWS) + 256 + 128) // 256) * 256
    with ExitStack() as stack:
        candidates = []
        for runtime in runtimes:
            try:
                model = models(runtime)
                needed = cache_bytes(model, runtime, cells)
                if needed > MEMORY_SHARE * available_memory().free:
                    left_out(runtime, f"its cache of {needed / 2**30:.1f} GiB takes too much of the free memory")
                    continue
                opened = open_context(model, runtime, cells=cells, num_ids=2, max_rows=max(ROWS + CHECKED_ROWS))
            except SpecplugError as error:
                left_out(runtime, str(error))
                continue
            candidates.append(_Candidate(runtime, PassTimer(stack.enter_context(opened)), runtime in keep))
        if not candidates:
            return {}
        for one in candidates:
            one.timer.fill(long)
            one.timer.time(1)
        _rounds(candidates, FIRST_ROWS, 2)
        candidates = _without_losers(candidates, long)
        for done, one in enumerate(candidates):
            one.equal_rows = rows_that_agree(one.timer.context, long, CHECKED_ROWS)
            one.prompt_ms[long] = one.timer.prompt_ms()
            progress(min(1.0, 0.5 * (done + 1) / len(candidates)))
        for context in reversed(contexts):
            for one in candidates:
                one.timer.fill(context)
            _rounds(candidates, ROWS, 1)
            for one in candidates:
                if context not in one.prompt_ms:
                    one.prompt_ms[context] = one.timer.prompt_ms()
        for _ in range(ROUNDS):
            for context in contexts:
                if perf_counter() - began > seconds:
                    break
                for one in candidates:
                    one.timer.fill(context)
                _rounds(candidates, ROWS, 1)
            progress(min(1.0, max(0.5, (perf_counter() - began) / max(seconds, 1e-9))))
    return {one.runtime: _costs(one, contexts) for one in candidates}


def _rounds(candidates: Sequence[_Candidate], rows: Sequence[int], rounds: int) -> None:
    for _ in range(rounds):
        for count in rows:
            for one in candidates:
                one.time(count)


def _without_losers(candidates: Sequence[_Candidate], context: int) -> list[_Candidate]:
    best = {rows: min(one.at(context, rows) for one in candidates) for rows in FIRST_ROWS}
    return [
        one for one in candidates if one.keep or any(one.at(context, rows) <= LOSES * best[rows] for rows in FIRST_ROWS)
    ]


def _costs(one: _Candidate, contexts: Sequence[int]) -> SettingCosts:
    ms = tuple(tuple(round(one.at(context, rows), 4) for rows in ROWS) for context in contexts)
    prompt_ms = tuple(round(one.prompt_ms[context], 4) for context in contexts)
    return SettingCosts(tuple(contexts), ROWS, ms, prompt_ms, one.equal_rows)
