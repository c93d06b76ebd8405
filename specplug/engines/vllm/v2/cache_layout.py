"""Where a key and a value lie in the block-wise KV cache of an attention layer of vLLM.

A layer has a cache of [blocks, kv heads, tokens of a block, 2 * head dim], which its kernels divide into keys and
values. How they do so is not stated anywhere, so each way that is known is tried: a block is written by the layer's own
function and has to be read back equal. Source: `do_kv_cache_update` in vllm/v1/attention/backends, releases in
versions.V2_SUPPORTED.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from specplug.errors import EngineError

Tensor = Any

Layout = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a cache to views of its keys and of its values, each [blocks, kv heads, tokens, head dim]."""

NULL_BLOCK = 0
"""vLLM gives this block to no request."""


def side_by_side(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Each token has its key and then its value: FlashAttention, FlashInfer, Triton and FlexAttention."""
    half = cache.shape[-1] // 2
    return cache[..., :half], cache[..., half:]


def keys_by_dimension(cache: Tensor) -> tuple[Tensor, Tensor]:
    """A block has all keys, dimension by dimension, and then all values: the kernels for CPUs."""
    blocks, heads, tokens, content = cache.shape
    halves = cache.view(blocks, heads, 2 * tokens, content // 2)
    keys = halves[:, :, :tokens].view(blocks, heads, content // 2, tokens).transpose(2, 3)
    return keys, halves[:, :, tokens:]


LAYOUTS: tuple[Layout, ...] = (side_by_side, keys_by_dimension)


def layout_of(layer: Any) -> Layout:
    """The layout of the cache of an attention layer of vLLM, whose null block is written to.

    EngineError, with the backend's name, if it is none of those that are known.
    """
    cache, backend = layer.kv_cache, layer.get_attn_backend().get_name()
    unknown = EngineError(f"short_context: the layout of the KV cache of {backend} is not known; remove short_context")
    if not isinstance(cache, torch.Tensor) or cache.dim() != 4 or not cache.dtype.is_floating_point:
        raise unknown
    _, heads, tokens, content = cache.shape
    source = torch.Generator().manual_seed(0)
    shape = 2, tokens, heads, content // 2
    keys, values = torch.randn(shape, generator=source).to(device=cache.device, dtype=cache.dtype)
    try:
        places = NULL_BLOCK * tokens + torch.arange(tokens, device=cache.device)
        layer.impl.do_kv_cache_update(layer, keys, values, cache, places)
        for layout in LAYOUTS:
            found = layout(cache[NULL_BLOCK : NULL_BLOCK + 1])
            if all(
                torch.equal(one[0].transpose(0, 1), other) for one, other in zip(found, (keys, values), strict=True)
            ):
                return layout
    except (AttributeError, RuntimeError, TypeError, ValueError):
        raise unknown from None
    finally:
        cache[NULL_BLOCK].zero_()
    raise unknown


def read_tokens(layout: Layout, cache: Tensor, blocks: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values at places of blocks of a cache, each [..., kv heads, head dim].

    blocks, offsets  int64[...]
    """
    keys, values = layout(cache)
    return keys[blocks, :, offsets], values[blocks, :, offsets]
