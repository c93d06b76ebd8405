"""Chooses the engine settings that a profile leaves open, by a short look at this model on this machine.

The choice is remembered for the model and the machine, so that every later answer is computed under the same settings:
another attention kernel or cache type rounds differently. Measuring all settings is `tune`'s work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import inf, prod, sqrt

import psutil

from specplug.engines.llama_cpp.context import cache_bytes, open_context
from specplug.engines.llama_cpp.engine_settings import CHECKED_ROWS, MEMORY_SHARE, attention_settings
from specplug.engines.llama_cpp.exact_passes import rows_that_agree
from specplug.engines.llama_cpp.measure import PassTimer
from specplug.engines.llama_cpp.model import Model
from specplug.errors import SpecplugError, UsageError
from specplug.machine import hardware
from specplug.machine.files import write_atomically
from specplug.machine.remembered import measurement_path
from specplug.profile import Profile, Runtime

SCHEMA = 2
"""Version of the format of remembered choices."""

EQUAL = (True, "bf16")
"""Flash attention over this cache type. With them attention rounds alike in passes of every size, since ggml computes
each row by itself; over an f16 cache flash attention splits the sum of a single row among several threads from 512
cells on. Whether the kernels of the weights round alike, too, is measured."""

CHECK_CONTEXT = 1024
"""Tokens in the cache when roundings are compared, where the profile's context allows it."""

CHECK_SECONDS = 1.2
"""Seconds for the passes of one row that are compared with larger ones; fewer rows are compared on slow machines."""

FEWEST_CHECKED = 9
"""Rows that are compared however slow passes are: kernels of ggml change at 4 and at 8 rows."""

SPEED_CONTEXT = 4096
"""Tokens in the cache when passes are timed, where the profile's context allows it: at a few hundred tokens the
settings hardly differ."""

SPEED_ROWS, SPEED_ROUNDS = (1, 4), 4
"""Row counts that are timed, and how often."""

OUT = 1.1
"""A setting is timed no further when its passes take this many times as long as those of the fastest one."""

TOLERANCE = 0.02
"""A setting that takes this share longer than the fastest one is as good; of those, the one nearest to llama.cpp's own
is taken."""


def with_settings(
    profile: Profile, model: Model, *, many: bool = False, notify: Callable[[str], None] = lambda text: None
) -> Profile:
    """The profile with every engine setting filled in that it leaves open.

    threads          every usable core
    flash_attention, kv_type
                     EQUAL for `exact`. Otherwise the fastest combination with which all passes round alike, as they
                     often do for 4- and 8-bit weights: then verified text is plain decoding's to the last bit. Where
                     there is none, the fastest of all

    Flash attention stays off over an f32 cache, which it would convert to f16 in every pass.

    many  several sequences share the cache. Flash attention skips the cells of other sequences, so it stays on

    Raises UsageError for settings that exclude each other.
    """
    runtime = replace(profile.runtime, threads=profile.runtime.threads or hardware.usable_cores())
    if profile.exact and runtime.flash_attention is False:
        raise UsageError(f"profile {profile.name}: exact needs flash_attention; drop one of the two")
    if profile.exact:
        runtime = replace(runtime, flash_attention=True, kv_type=runtime.kv_type or EQUAL[1])
    if runtime.kv_type == "q8_0":
        if runtime.flash_attention is False:
            raise UsageError(
                f"profile {profile.name}: a q8_0 cache needs flash_attention; drop one of the two settings"
            )
        runtime = replace(runtime, flash_attention=True)
    if runtime.flash_attention is None and (many or runtime.kv_type == "f32"):
        runtime = replace(runtime, flash_attention=runtime.kv_type != "f32")
    if runtime.flash_attention is None or runtime.kv_type is None:
        runtime = _remembered(model, runtime, notify)
    return replace(profile, runtime=runtime)


def look(model: Model, runtime: Runtime) -> Runtime:
    """The setting to use among those that `runtime` leaves open: the fastest one with which passes of every size round
    alike, or the fastest of all where there is none. Takes one to six seconds for models of up to 1.5B parameters on
    two cores.

    The first one where the model's memory cannot take tokens back, so that no pass can be repeated over the same cache.
    """
    candidates = [one for one in attention_settings(runtime) if runtime.kv_type is not None or one.kv_type != "f32"]
    if model.has_recurrent_memory:
        return candidates[0]
    equal = [one for one in candidates if one.flash_attention and _rounds_alike(model, one)]
    return _fastest(model, equal or candidates)


def _fastest(model: Model, candidates: Sequence[Runtime]) -> Runtime:
    """The first one that takes at most 1 + TOLERANCE times as long as the fastest, at a long context."""
    if len(candidates) == 1:
        return candidates[0]
    context = min(SPEED_CONTEXT, candidates[0].context)
    with ExitStack() as stack:
        timers: dict[Runtime, PassTimer] = {}
        for one in candidates:
            if cache_bytes(model, one, _cells(context)) > MEMORY_SHARE * psutil.virtual_memory().available:
                continue
            try:
                opened = open_context(model, one, cells=_cells(context), num_ids=2, max_rows=max(SPEED_ROWS))
            except SpecplugError:
                continue
            timers[one] = PassTimer(stack.enter_context(opened))
            timers[one].fill(context)
            timers[one].time(1)
        if not timers:  # the profile's own context will say why
            return candidates[0]
        times = {(one, rows): inf for one in timers for rows in SPEED_ROWS}
        for _ in range(SPEED_ROUNDS):
            for rows in SPEED_ROWS:
                for one, timer in timers.items():
                    times[one, rows] = min(times[one, rows], timer.time(rows))
            means = {one: sqrt(prod(times[one, rows] for rows in SPEED_ROWS)) for one in timers}
            timers = {one: timer for one, timer in timers.items() if means[one] <= OUT * min(means.values())}
            if len(timers) == 1:
                break
    return next(one for one in timers if means[one] <= (1 + TOLERANCE) * min(means.values()))


def _rounds_alike(model: Model, runtime: Runtime) -> bool:
    """Whether passes over up to 25 rows round alike; over fewer rows where passes are slow."""
    context = min(CHECK_CONTEXT, runtime.context)
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(
                open_context(model, runtime, cells=_cells(context), num_ids=2, max_rows=max(CHECKED_ROWS))
            )
        except SpecplugError:  # the type is missing in this build, or there is no memory for it
            return False
        timer = PassTimer(opened)
        timer.fill(context)
        timer.time(1)
        most = min(max(FEWEST_CHECKED, int(CHECK_SECONDS * 1000 / timer.time(1))), CHECKED_ROWS[-1])
        checked = [*(rows for rows in CHECKED_ROWS if rows < most), most]
        return rows_that_agree(opened, context, checked) == checked[-1]


def _cells(context: int) -> int:
    return -(-(context + 128) // 256) * 256


def _remembered(model: Model, runtime: Runtime, notify: Callable[[str], None]) -> Runtime:
    """The choice in the user's cache folder for this model, machine and runtime; made first where there is none."""
    decisive = replace(runtime, context=min(runtime.context, SPEED_CONTEXT), batch=0, ubatch=None, coupled=False)
    path = measurement_path("settings", model.path, (SCHEMA, decisive))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        wanted = data["flash_attention"], data["kv_type"]
        return next(one for one in attention_settings(runtime) if (one.flash_attention, one.kv_type) == wanted)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        pass
    chosen = look(model, runtime)
    kept = {"schema": SCHEMA, "flash_attention": chosen.flash_attention, "kv_type": chosen.kv_type}
    try:
        write_atomically(path, json.dumps(kept).encode())
    except SpecplugError as error:
        notify(f"{error}; engine settings will be chosen again next time")
    return chosen
