"""The pool of a drafter with a short context, on made-up keys: it attends to the kept positions and to nothing else."""

from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from specplug.engines.vllm.v2.cache_layout import keys_by_dimension, layout_of, read_tokens, side_by_side
from specplug.engines.vllm.v2.kept_cache import EMPTY, KeptCache, row_bytes
from specplug.errors import EngineError

pytestmark = pytest.mark.vllm

TEXTS, LAYERS, KV_HEADS, HEADS, DIM = 3, 2, 2, 4, 8
LEAD, RECENT, DRAFT = 12, 10, 3


class MadeUpTarget:
    """Keys and values of texts as the target would have them: [layer, text, position, head, dimension]."""

    def __init__(self) -> None:
        source = torch.Generator().manual_seed(1)
        self.keys, self.values = torch.randn(2, LAYERS, TEXTS, 260, KV_HEADS, DIM, generator=source)

    def read(self, rows: Any, positions: Any) -> Any:
        at = rows[:, None], positions
        return lambda layer: (self.keys[layer][at], self.values[layer][at])


def new_pool() -> KeptCache:
    return KeptCache(
        rows=TEXTS,
        layers=LAYERS,
        lead=LEAD,
        recent=RECENT,
        draft=DRAFT,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        device="cpu",
    )


def expected(keys: Any, values: Any, query: Any) -> Any:
    """Attention of one token; keys and values [p, kv heads, dim], query [heads, dim]."""
    shared = HEADS // KV_HEADS
    keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    weights = (torch.einsum("phd,hd->ph", keys, query) * 0.3).softmax(0)
    return torch.einsum("ph,phd->hd", weights, values)


def test_a_pass_attends_to_the_kept_positions_and_to_the_draft_so_far() -> None:
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    target, pool = MadeUpTarget(), new_pool()
    lengths = [60, 9, 150]
    chosen = [[0, 1, 2, 20, 21, 22, 30, 31], [], [0, *range(100, 111)]]
    padded = torch.tensor([[*one, *[EMPTY] * (LEAD - len(one))] for one in chosen])
    least = torch.tensor([50, 0, 145])
    pool.fill(torch.arange(TEXTS), padded, least, torch.tensor(lengths), target.read)
    oldest = [50, 0, 145]
    for _ in range(20):
        oldest = check_each_depth(pool, target, chosen, oldest, lengths)
        lengths = [length + int(random.integers(1, DRAFT + 2)) for length in lengths]
        pool.refresh(torch.tensor(lengths), target.read)
    assert min(length - 1 - first for first, length in zip(oldest, lengths, strict=True)) >= RECENT


def check_each_depth(
    pool: KeptCache, target: MadeUpTarget, chosen: list[list[int]], oldest: list[int], lengths: list[int]
) -> list[int]:
    """Draft as often as possible, and compare each pass with attention over the kept positions and the drafted ones.

    Once the ring is full, a draft token takes the place of the oldest token in it. Returns the oldest ones left.
    """
    query = torch.randn(HEADS, DIM)
    drafted = torch.randn(2, DRAFT, LAYERS, TEXTS, KV_HEADS, DIM)
    ring = RECENT + DRAFT + 1
    for step in range(DRAFT):
        at = [length - 1 + step for length in lengths]
        pool.begin_pass(torch.tensor(at))
        oldest = [max(one, place - ring + 1) for one, place in zip(oldest, at, strict=True)]
        for layer in range(LAYERS):
            found = pool.attend(layer, query.expand(TEXTS, -1, -1), *drafted[:, step, layer], 0.3)
            for text in range(TEXTS):
                kept = [*chosen[text], *range(oldest[text], lengths[text] - 1)]
                keys = torch.cat((target.keys[layer, text, kept], drafted[0, : step + 1, layer, text]))
                values = torch.cat((target.values[layer, text, kept], drafted[1, : step + 1, layer, text]))
                torch.testing.assert_close(found[text], expected(keys, values, query))
    return oldest


def test_after_steps_without_drafts_the_recent_tokens_are_read_anew() -> None:
    """What was drafted before them is not attended to, however far the texts went."""
    torch.manual_seed(0)
    target, pool = MadeUpTarget(), new_pool()
    lengths = torch.tensor([60, 61, 62])
    nothing = torch.full((TEXTS, LEAD), EMPTY)
    pool.fill(torch.arange(TEXTS), nothing, torch.zeros(TEXTS, dtype=torch.int64), lengths, target.read)
    check_each_depth(pool, target, [[]] * TEXTS, [49, 50, 51], lengths.tolist())
    for further in (1, 7, 13, 14, 40):
        lengths = lengths + further
        pool.catch_up(lengths, target.read)
        check_each_depth(pool, target, [[]] * TEXTS, (lengths - 1 - RECENT).tolist(), lengths.tolist())


def test_the_bytes_of_a_row_are_those_of_its_keys_and_values() -> None:
    pool = new_pool()
    sizes = {"lead": LEAD, "recent": RECENT, "draft": DRAFT, "kv_heads": KV_HEADS, "head_dim": DIM, "layers": LAYERS}
    assert TEXTS * row_bytes(element_bytes=4, **sizes) == pool.keys.nbytes + pool.values.nbytes


class MadeUpLayer:
    """An attention layer of vLLM, of which the cache and the function that writes to it are needed."""

    def __init__(self, content: int, write: Any) -> None:
        self.kv_cache = torch.zeros(5, KV_HEADS, 32, content)
        self.impl = self
        self.do_kv_cache_update = write

    def get_attn_backend(self) -> Any:
        return CPUAttentionBackend


def write_side_by_side(layer: Any, key: Any, value: Any, cache: Any, places: Any) -> None:
    cache[places // 32, :, places % 32] = torch.cat((key, value), -1)


def write_for_cpus(layer: Any, key: Any, value: Any, cache: Any, places: Any) -> None:
    from vllm import _custom_ops as ops

    halves = cache.view(*cache.shape[:2], 64, -1).chunk(2, dim=2)
    isa = _get_attn_isa(torch.float32, 32, key.shape[-1])
    ops.cpu_attn_reshape_and_cache(key, value, *halves, places, isa)


def write_unknown(layer: Any, key: Any, value: Any, cache: Any, places: Any) -> None:
    write_side_by_side(layer, key.flip(-1), value, cache, places)


@pytest.mark.parametrize(("write", "layout"), [(write_side_by_side, side_by_side), (write_for_cpus, keys_by_dimension)])
def test_the_layout_of_a_cache_is_found_by_writing_to_it(write: Any, layout: Any) -> None:
    layer = MadeUpLayer(64, write)
    assert layout_of(layer) is layout
    assert not layer.kv_cache.any(), "vLLM's null block is left empty"
    key, value = torch.randn(2, 70, KV_HEADS, 32)
    places = torch.randperm(5 * 32)[:70]
    write(layer, key, value, layer.kv_cache, places)
    found = read_tokens(layout, layer.kv_cache, (places // 32).view(7, 10), (places % 32).view(7, 10))
    for one, other in zip(found, (key, value), strict=True):
        assert torch.equal(one, other.view(7, 10, KV_HEADS, 32))


def test_an_unknown_layout_is_refused_by_the_name_of_the_backend() -> None:
    with pytest.raises(EngineError, match="short_context: the layout of the KV cache of CPU_ATTN is not known"):
        layout_of(MadeUpLayer(64, write_unknown))
    layer = MadeUpLayer(64, write_side_by_side)
    layer.kv_cache = layer.kv_cache.to(torch.uint8)
    with pytest.raises(EngineError, match="is not known"):
        layout_of(layer)
