"""The bytes that a run needs, computed from the headers of its model files before any is opened.

Estimates on the low side, since a run that would fit must not be refused; opening a model or context can still fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specplug.errors import UsageError
from specplug.machine.memory import AvailableMemory, gib
from specplug.models.gguf_header import Header, parts_of, read_header
from specplug.profile import Runtime

KV_BYTES = {
    **{"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32},
    **{"q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32, "iq4_nl": 18 / 32},
}
"""Bytes of one cached number, in all types that llama-server takes. Source: the blocks in ggml's ggml-common.h."""

DEFAULT_KV_TYPE = "f16"
"""The type that llama.cpp takes where none is named."""

LEAST_CONTEXT = 512
"""Tokens; a smaller context is no advice."""

Number = int | tuple[int, ...] | None
"""A whole number of a model's metadata, or one per layer; None where the key is missing."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of one model with one context.

    weights  all of its files. Mapped ones count, too: a pass reads every weight. A copy in the CPU kernels' own layout
             (`runtime.repack`) does not count twice: the kernel drops the mapped pages that it was made from
    cache    the keys and values of `cells` tokens; 0 for a state of fixed size
    compute  the largest tensors of a pass: the inner layers' rows and the logits
    sparse   whether a pass reads some of the weights only, and they are mapped: then all need not be in memory at once
    """

    weights: int
    cache: int = 0
    cells: int = 0
    compute: int = 0
    sparse: bool = False

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute


def memory_need(path: Path, runtime: Runtime, cells: int) -> MemoryNeed:
    """What a model file takes with a context of so many cells. UsageError where its header cannot be read."""
    header = read_header(path)
    cache = int(cells * numbers_per_cell(header.numbers.get) * KV_BYTES[runtime.kv_type or DEFAULT_KV_TYPE])
    sparse = runtime.mmap and bool(header.numbers.get("expert_count"))
    return MemoryNeed(weight_bytes(path), cache, cells, _compute_bytes(header, runtime, cells), sparse)


def check_memory(
    model: Path,
    needed: MemoryNeed,
    drafters: Sequence[tuple[Path, MemoryNeed]],
    available: AvailableMemory,
    kv_type: str | None,
) -> str | None:
    """Raise UsageError, with the figures and what to change, where the model and its drafters do not fit.

    Returns a warning where they fit only because not all weights are needed at once; else None.
    """
    total = needed.total + sum(own.total for _, own in drafters)
    if total <= available.free:
        return None
    if needed.sparse and total - needed.weights <= available.free:
        return (
            f"{model.name} has {gib(needed.weights)} GiB of weights, and {available}: experts that do not fit are read "
            "from the disk again and again, which is slow"
        )
    parts = [f"weights {gib(needed.weights)}"]
    if needed.cache:
        parts.append(f"KV cache of {needed.cells} tokens {gib(needed.cache)}")
    parts += [f"drafter {path.name} {gib(own.total)}" for path, own in drafters]
    if needed.compute:
        parts.append(f"compute buffers {gib(needed.compute)}")
    advice = [f"a smaller {'drafter' if drafters else 'model'}"]
    context = _fitting_context(needed, available.free - (total - needed.cache))
    if context:
        advice.append(f"--context {context}")
    if needed.cache and kv_type != "q8_0":
        advice.append("a kv_type of q8_0")
    use = f"{', '.join(advice[:-1])} or {advice[-1]}" if len(advice) > 1 else advice[0]
    raise UsageError(f"{model.name} needs about {gib(total)} GiB ({', '.join(parts)}), and {available}; use {use}")


def check_cache(needed: int, cells: int, kv_type: str | None, available: AvailableMemory) -> None:
    """Raise UsageError where a KV cache of so many bytes does not fit."""
    if needed <= available.free:
        return
    smaller = "" if kv_type == "q8_0" else ", or a kv_type of q8_0"
    raise UsageError(
        f"a KV cache of {cells} tokens needs {gib(needed)} GiB as {kv_type or DEFAULT_KV_TYPE}, and {available}; "
        f"use a smaller --context (in serve, or fewer --slots){smaller}"
    )


def numbers_per_cell(read: Callable[[str], Number]) -> int:
    """Numbers that the cache holds for one token, as if every layer attended to all of it; 0 where that is unknown.

    read  the metadata by its key without the architecture's name
    """
    layers, heads = _one(read("block_count")), _one(read("attention.head_count"))
    keys = _one(read("attention.key_length")) or (_one(read("embedding_length")) // heads if heads else 0)
    values = _one(read("attention.value_length")) or keys
    kv_heads = read("attention.head_count_kv")
    if isinstance(kv_heads, tuple):  # one number per layer; 0 in layers that keep a state instead
        return sum(kv_heads) * (keys + values)
    if read("ssm.inner_size") is not None:  # some layers keep a state, and which ones is not said
        layers = layers // _one(read("full_attention_interval")) if read("full_attention_interval") else 0
    if read("attention.key_length_mla") is not None:  # values are computed from the cached keys
        values = 0
    layers -= _one(read("attention.shared_kv_layers"))
    return max(0, layers) * (heads if kv_heads is None else kv_heads) * (keys + values)


def weight_bytes(path: Path) -> int:
    """Bytes of a model's file, or of all the parts of a model in several; parts that are missing count as 0."""
    return sum(one.stat().st_size for one in parts_of(path) if one.is_file())


def _compute_bytes(header: Header, runtime: Runtime, cells: int) -> int:
    """The two widest activations of a pass in float32, its attention scores without flash attention, one row of logits.

    llama.cpp's buffer holds what lives at the same time, which is more for some architectures.
    """
    rows = min(runtime.ubatch or runtime.batch, cells)
    width, inner = (_one(header.numbers.get(key)) for key in ("embedding_length", "feed_forward_length"))
    scores = 0
    if runtime.flash_attention is False:
        scores = rows * cells * _one(header.numbers.get("attention.head_count"))
    return 4 * (rows * (width + 2 * inner) + scores + min(rows, 1) * header.num_tokens)


def _fitting_context(needed: MemoryNeed, free: int) -> int:
    """The largest power of two for whose cache so many bytes suffice; 0 where no useful one fits."""
    if not needed.cache or free <= 0:
        return 0
    cells = min(free * needed.cells // needed.cache, needed.cells)
    context = 1 << (cells.bit_length() - 1) if cells else 0
    return context if LEAST_CONTEXT <= context < needed.cells else 0


def _one(number: Number) -> int:
    """The number, or the largest one of a list; 0 where there is none."""
    if isinstance(number, tuple):
        return max(number, default=0)
    return number or 0
