"""Counts what `short_context` adds to a step in vLLM's V2 runner, beside the passes of the model: operations and bytes.

    python benchmarks/v2_short_context.py

The layers of the model are made up: each calls attention on random queries, keys and values. Texts have 32,768
tokens, and the window its default sizes. An operation is one that computes, as in v2_cost.py; bytes are those of keys
and values, in 16 bits, per request. Nothing here is about time.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from v2_cost import Operations

from specplug.engines.vllm.v2.device_chains import DeviceStep, DeviceTexts
from specplug.engines.vllm.v2.device_short_context import DeviceShortContext
from specplug.proposers.short_context import ShortContext

K = 4
TOKENS = 32_768
VOCABULARY = 1000
BLOCK = 16
HEADS, KV_HEADS, SIZE = 8, 2, 32

MODELS = {"Llama-3.1-8B": (32, 8, 128), "Qwen2.5-7B": (28, 4, 128), "Qwen2.5-0.5B": (24, 2, 64)}
"""Layers, KV heads, head size."""


class MadeUpLayers:
    """In place of `TargetLayers`."""

    def __init__(self, count: int, blocks: int) -> None:
        self.attention = [MadeUpAttention(blocks) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.attention)

    def hidden(self, tokens: Any, positions: Any, count: int, attend: Any) -> Any:
        n = len(tokens)
        with torch.utils._python_dispatch._disable_current_modes():
            query, key = torch.randn(n, HEADS * SIZE), torch.randn(n, KV_HEADS * SIZE)
        for number in range(count):
            query = attend(number, query, key, key)
        return query

    def logits(self, hidden: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return torch.randn(len(hidden), VOCABULARY)


class MadeUpAttention:
    """In place of vLLM's `Attention`."""

    num_kv_heads, head_size = KV_HEADS, SIZE

    def __init__(self, blocks: int) -> None:
        self.kv_cache = torch.zeros(blocks, KV_HEADS, BLOCK, 2 * SIZE)
        self.impl = SimpleNamespace(scale=SIZE**-0.5, do_kv_cache_update=self.write)

    def get_attn_backend(self) -> Any:
        return SimpleNamespace(get_name=lambda: "made up")

    @staticmethod
    def write(layer: Any, key: Any, value: Any, cache: Any, places: Any) -> None:
        cache[places // BLOCK, :, places % BLOCK] = torch.cat((key, value), -1)


def operations(layers: int, n: int) -> tuple[int, int]:
    """Of a step, and of a step in which the parts of one text are chosen."""
    blocks = TOKENS // BLOCK + 1
    made_up = MadeUpLayers(layers, blocks)
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=2 * TOKENS, dtype=torch.float32, skip_tokenizer_init=True),
        scheduler_config=SimpleNamespace(max_num_seqs=n),
        speculative_config=SimpleNamespace(num_speculative_tokens=K),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=1 << 36),
    )
    proposer = DeviceShortContext(ShortContext(), VOCABULARY, torch.device("cpu"))
    proposer.reserve(made_up, config)
    target = SimpleNamespace(
        layers=made_up,
        config=config,
        max_length=2 * TOKENS,
        block_size=BLOCK,
        kv_cache=lambda layer: made_up.attention[layer].kv_cache,
        block_table_of_slots=torch.arange(blocks).expand(n, -1).int(),
        slots_on_host=list(range(n)),
        slots_read=set(range(n - 1)),
    )
    proposer.attach(target)
    tokens = torch.randint(0, VOCABULARY, (n, 2 * TOKENS)).int()
    for slot in range(n):
        proposer.begin_request(slot, tokens[slot, : TOKENS - 8].tolist())
    lengths = torch.full((n,), TOKENS - 7, dtype=torch.int32)
    texts = DeviceTexts(torch.arange(n), tokens, lengths, 2 * TOKENS)
    nothing = torch.zeros((n, K + 1), dtype=torch.int64)
    step = DeviceStep(nothing, nothing, nothing > 0)

    def counted() -> int:
        proposer.observe(step)
        with Operations() as counting:
            proposer.propose(texts, K)
        return counting.count

    counted()  # chooses the parts of all texts but the last one
    usual = counted()
    target.slots_read.add(n - 1)
    return usual, counted()


def main() -> None:
    print("| layers | sequences | operations of a step | with a choice |\n|---|---|---|---|")
    for layers in (16, 32):
        for n in (2, 16):
            print(f"| {layers} | {n} | {' | '.join(map(str, operations(layers, n)))} |", flush=True)
    window = ShortContext().window
    assert window is not None
    titles = f"a row | a draft token reads | a pass of the target at {TOKENS:,} tokens reads | a choice copies"
    print(f"\n| model | {titles} |\n|---|---|---|---|---|")
    for name, (layers, heads, size) in MODELS.items():
        token = 2 * 2 * layers * heads * size
        places = window.size + K + 1
        columns = [places, places, TOKENS, window.size]
        print(f"| {name} | {' | '.join(f'{count * token / 2**20:,.0f} MiB' for count in columns)} |")


if __name__ == "__main__":
    main()
