"""Chooses the engine settings that a profile leaves open, by the weights' format and the shape of the attention.

The choice is the same in every run on a machine, so that every answer is computed under the same settings: another
attention kernel or cache type rounds differently. It rests on passes of a tiny model (`library_check.py`), so that no
answer waits for it; measuring the settings of the model itself is `tune`'s work.
"""

from __future__ import annotations

from dataclasses import replace

from specplug.engines.llama_cpp.engine_settings import CHECKED_ROWS, attention_settings, can_offload
from specplug.engines.llama_cpp.library_check import findings, whole_header
from specplug.engines.llama_cpp.model import Model
from specplug.errors import EngineError, UsageError
from specplug.machine import hardware
from specplug.profile import Profile, Runtime

EQUAL = (True, "bf16")
"""Flash attention over this cache type. With them attention rounds alike in passes of every size, since ggml computes
each row by itself; over an f16 cache flash attention splits the sum of a single row among several threads from 512
cells on. Whether the kernels of the weights round alike, too, is measured."""

STOCK = (True, "f16")
"""What llama.cpp takes where nothing is named."""

TOLERANCE = 0.1
"""A kernel that takes this share longer than the fastest one is as good; of those, the one nearest to llama.cpp's own
is taken."""


def with_settings(profile: Profile, model: Model, *, many: bool = False) -> Profile:
    """The profile with every engine setting filled in that it leaves open.

    threads          every usable core
    gpu_layers       none where this build cannot use a GPU
    flash_attention, kv_type
                     EQUAL for `exact`. Otherwise the fastest combination with which all passes round alike, as they
                     often do for 4- and 8-bit weights: then verified text is plain decoding's to the last bit. Where
                     there is none, the fastest of all

    Flash attention stays off over an f32 cache, which it would convert to f16 in every pass.

    many  several sequences share the cache. Flash attention skips the cells of other sequences, so it stays on

    Raises UsageError for settings that exclude each other, and EngineError for those that the library cannot compute.
    """
    runtime = replace(profile.runtime, threads=profile.runtime.threads or hardware.usable_cores())
    if not can_offload():
        runtime = replace(runtime, gpu_layers=0)
    if not model.way.flash_attention:
        if profile.exact or runtime.kv_type == "q8_0":
            needs = "exact" if profile.exact else "a q8_0 cache"
            raise EngineError(f"profile {profile.name}: {needs} needs flash attention, which ends the process here")
        runtime = replace(runtime, flash_attention=False)
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
        runtime = _chosen(model, runtime)
    return replace(profile, runtime=runtime)


def _chosen(model: Model, runtime: Runtime) -> Runtime:
    """The setting to use among those that `runtime` leaves open.

    The first one where the model's memory cannot take tokens back. Flash attention where layers attend to a window,
    since it skips the cells outside.
    """
    candidates = [one for one in attention_settings(runtime) if runtime.kv_type is not None or one.kv_type != "f32"]
    if model.has_recurrent_memory or len(candidates) == 1:
        return candidates[0]
    header = whole_header(model.path)
    found = findings(header, compare=True, offloads=runtime.gpu_layers != 0)
    by_pair = {(bool(one.flash_attention), str(one.kv_type)): one for one in candidates}
    if EQUAL in by_pair and found.equal_rows == CHECKED_ROWS[-1]:
        return by_pair[EQUAL]
    if header.numbers.get("attention.sliding_window") and STOCK in by_pair:
        return by_pair[STOCK]
    times = {(on, kind): ms for on, kind, ms in found.kernels if (on, kind) in by_pair}
    if not times:
        return candidates[0]
    fastest = min(times.values())
    return next(one for pair, one in by_pair.items() if times.get(pair, fastest * 2) <= (1 + TOLERANCE) * fastest)
