"""Finds the engine settings under which plain decoding answers a workload fastest.

Drafts are compared with plain decoding under those settings: settings that slow plain decoding down would make drafts
look better than they are. The module does not depend on arms or on drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import TYPE_CHECKING

from specplug.core import IntArray
from specplug.engines.llama_cpp import settings_table
from specplug.engines.llama_cpp.settings_table import label
from specplug.errors import SpecplugError
from specplug.machine import hardware
from specplug.planning.request_time import SettingCosts
from specplug.profile import Runtime

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.model import Model

SECONDS = 8.0
"""Seconds for measuring the settings."""

AS_GOOD = 0.02
"""The profiles' own setting, or else llama.cpp's, is taken where a plain request takes at most this share longer than
under the fastest one. Less is within the noise of a short measurement, and every further setting is one more arm."""

CONTEXTS = (256, 512, 1024, 2048, 4096)
"""Tokens in the cache when passes are timed: the first of these, and the one that the longest request needs. Fixed
steps, so that figures remembered from several workloads can be compared."""


def request_lengths(
    conversations: Sequence[Sequence[str]], encode: Callable[[Sequence[dict[str, str]]], IntArray], max_tokens: int
) -> list[int]:
    """Tokens of the prompt of every request, at most: earlier answers count with `max_tokens` tokens each.

    conversations  the user's turns
    encode         turns messages into prompt tokens; it gets one turn at a time, since some chat templates refuse two
                   messages of the user in a row
    """
    lengths = []
    for turns in conversations:
        prompt = 0
        for turn in turns:
            prompt += len(encode([{"role": "user", "content": turn}]))
            lengths.append(prompt)
            prompt += max_tokens
    return lengths


def llama_cpp_defaults(runtime: Runtime) -> Runtime:
    """The settings that llama.cpp takes where none is named, with the weights opened as `runtime` opens them."""
    from specplug.engines.llama_cpp.engine_settings import stock

    return replace(stock(runtime), repack=runtime.repack, mmap=runtime.mmap)


def best_plain_setting(
    model: Model,
    runtime: Runtime,
    lengths: Sequence[int],
    max_tokens: int,
    *,
    many: bool,
    notify: Callable[[str], None] = lambda text: None,
) -> tuple[Runtime, bool]:
    """The setting of attention kernel and cache type for plain decoding, measured in about SECONDS and remembered; and
    whether llama.cpp's own was measured: it is left out where its cache does not fit into memory.

    The profiles' own setting, unmeasured, where the model's memory cannot take tokens back.

    runtime     the profiles' own setting, with all keys filled in; everything else of it is kept
    lengths     tokens of the workload's prompts
    max_tokens  new tokens of each request
    many        several sequences share the cache
    """
    from specplug.engines.llama_cpp.engine_settings import attention_settings, measure_settings

    stock = llama_cpp_defaults(runtime)
    if model.has_recurrent_memory:
        return runtime, False
    kernel = True if many else None
    by_label: dict[str, Runtime] = {}
    for one in (runtime, stock, *attention_settings(replace(runtime, flash_attention=kernel, kv_type=None))):
        by_label.setdefault(label(one), one)
    busy = hardware.busy_warning()
    notify(f"measuring the engine settings for plain decoding (about {SECONDS:.0f} s)")
    costs = measure_settings(
        lambda one: model,
        list(by_label.values()),
        contexts_for(min(max(lengths, default=0) + max_tokens, runtime.context)),
        SECONDS,
        keep=[runtime, stock],
        left_out=lambda one, reason: notify(f"{label(one)}: not measured: {reason}"),
    )
    if costs and not busy:
        try:
            settings_table.remember(model.path, costs)
        except SpecplugError as error:
            notify(f"{error}; these engine settings will not be remembered")
    prompt = round(mean(lengths)) if lengths else 0
    return chosen(costs, runtime, stock, prompt, max_tokens, many=many), stock in costs or runtime == stock


def contexts_for(tokens: int) -> list[int]:
    """The contexts to measure for requests of up to `tokens` tokens, prompt and answer together."""
    longest = next((context for context in CONTEXTS if context >= tokens), CONTEXTS[-1])
    return sorted({CONTEXTS[0], longest})


def chosen(
    costs: Mapping[Runtime, SettingCosts], own: Runtime, stock: Runtime, prompt: int, tokens: int, *, many: bool
) -> Runtime:
    """The fastest setting for a plain request; `own` or `stock` where they are AS_GOOD, and `own` where none is left.

    prompt, tokens  tokens of the prompt, and new tokens
    many            several sequences share the cache: without flash attention a pass would compute the cells of all of
                    them, which a measurement on one sequence does not show, so such settings are left out
    """
    times = {
        runtime: one.plain_ms(prompt, tokens) for runtime, one in costs.items() if runtime.flash_attention or not many
    }
    if not times:
        return own
    best = min(times, key=times.__getitem__)
    for preferred in (own, stock):
        if preferred in times and times[preferred] <= (1 + AS_GOOD) * times[best]:
            return preferred
    return best
