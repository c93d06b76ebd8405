"""The target that vLLM's V2 runner has loaded, with its KV cache and the blocks of the running batch.

A drafter can read the cache, and run one-token passes of the target's layers with the target's own attention, which
write K/V where the next verification overwrites them. It knows nothing about drafts.
Source: vllm/v1/worker/gpu/{model_runner,block_table,attn_utils}.py and spec_decode/speculator.py, 0.32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, init_attn_backend

from specplug.engines.vllm.v2.target_layers import TargetLayers
from specplug.engines.vllm.v2.v2_interface import check_target_interface
from specplug.engines.vllm.versions import against_target_layers, installed
from specplug.errors import EngineError, UsageError

Tensor = Any

WAITING = "FLASHINFER"
"""The attention backend whose metadata may be made on the host."""

logger = init_logger("vllm.specplug")


class TargetModel:
    """Call `follow` in every step, before drafting.

    A position is written only where the host knows, in the same step, that the request owns its block. The engine's
    order of execution then makes every write safe: blocks that are given to another request afterwards are filled by a
    later pass, and the engine shares blocks of confirmed tokens only, while draft tokens come after them.
    """

    def __init__(self, runner: Any, method: str) -> None:
        """
        runner  vLLM's `GPUModelRunner`, with its KV cache allocated
        method  the proposer that needs the target, for errors

        UsageError for a model or a cache with which the layers cannot be run apart; EngineError for a vLLM with another
        interface.
        """
        check_target_interface()
        self.config = runner.vllm_config
        self.layers = TargetLayers(runner.model, method)
        self.device = runner.device
        self.max_length: int = runner.max_model_len
        self.num_slots: int = runner.max_num_reqs
        groups = runner.kv_cache_config.kv_cache_groups
        if len(groups) != 1 or not _is_complete(groups[0].kv_cache_spec):
            raise UsageError(
                f"{method}: this model has several kinds of KV cache (sliding windows, or states); it needs one whose "
                "layers all attend to the complete text"
            )
        self.block_size: int = groups[0].kv_cache_spec.block_size
        """Tokens of a block of the KV cache."""
        self._tables = runner.block_tables
        self._cache_config = runner.kv_cache_config
        self._groups: list[list[Any]] | None = None
        self._starts = torch.arange(self.num_slots + 1, dtype=torch.int32, device=self.device)
        self._starts_on_host = torch.arange(self.num_slots + 1, dtype=torch.int32)
        self._not_prefilling = torch.zeros(self.num_slots, dtype=torch.bool)
        self.num_rows = 0
        """Requests of the batch."""
        self.room = torch.zeros(0, dtype=torch.int64, device=self.device)
        """int64[n]: tokens for which each request of the batch has blocks."""
        self._longest = torch.zeros(0, dtype=torch.int32)
        self.slots_on_host: list[int] = []
        """The slots of the requests of the batch; empty for a dummy batch."""
        self.slots_read: set[int] = set()
        """Those whose prompts the target has read completely."""

    def kv_cache(self, layer: int) -> Tensor:
        """The K/V of a layer, [blocks, ...]: the order of the other dimensions is that of its attention backend."""
        return self.layers.attention[layer].kv_cache

    @property
    def block_table(self) -> Tensor:
        """int32[n, blocks]: of each request of the batch, its blocks; entries beyond `room` are not its own."""
        return self._tables.input_block_tables[0][: self.num_rows]

    @property
    def block_table_of_slots(self) -> Tensor:
        """int32[slots, blocks]: as `block_table`, of the request in each slot."""
        return self._tables.block_tables[0].gpu

    def follow(self, input_batch: Any, *, is_dummy: bool = False) -> None:
        """Use the batch that the runner has just passed through the model. A dummy batch owns no blocks."""
        n: int = input_batch.num_reqs
        self.num_rows = n
        # The tokens of a prompt that the pass before this one and this one have read are known to the host.
        read = input_batch.num_computed_prefill_tokens_np[:n] + input_batch.num_scheduled_tokens[:n]
        slots = input_batch.idx_mapping_np[:n]
        self.slots_on_host = [] if is_dummy else slots.tolist()
        self.slots_read = set() if is_dummy else set(slots[read >= input_batch.prefill_len_np[:n]].tolist())
        # Read now: in the next step, the row of a slot can belong to another request.
        blocks = self._tables.num_blocks.np[0, input_batch.idx_mapping_np[:n]].astype("int64")
        self.room = async_tensor_h2d(torch.from_numpy(blocks * (0 if is_dummy else self.block_size)), self.device)
        self._longest = input_batch.seq_lens_cpu_upper_bound[:n]

    def has_room(self, positions: Tensor) -> Tensor:
        """bool[n]: whether each request of the batch owns the block of a position.

        positions  int64[n]
        """
        return (positions >= 0) & (positions < self.room.clamp(max=self.max_length))

    @contextmanager
    def one_token_pass(self, positions: Tensor, writes: Tensor, ahead: int) -> Iterator[Tensor]:
        """A forward context for a pass over one token per request of the batch; gives its positions, int64[n].

        Each token attends to what its request has in the cache before it, and to itself. Rows that are not written
        are moved to position 0, where what they compute means nothing.

        positions  int64[n]
        writes     bool[n]  the rows whose K/V are written; all of them must have room
        ahead      tokens by which the texts may be longer than those that the target has read
        """
        n = self.num_rows
        positions = positions.masked_fill(~writes, 0)
        blocks = self.block_table.gather(1, (positions // self.block_size)[:, None])[:, 0].long()
        places = (blocks * self.block_size + positions % self.block_size).masked_fill(~writes, PAD_SLOT_ID)
        longest = (self._longest + ahead).clamp(max=self.max_length)
        metadata = build_attn_metadata(
            attn_groups=self._attention_groups(),
            num_reqs=n,
            num_tokens=n,
            query_start_loc_gpu=self._starts[: n + 1],
            query_start_loc_cpu=self._starts_on_host[: n + 1],
            max_query_len=1,
            seq_lens=(positions + 1).int(),
            max_seq_len=int(longest.max()),
            block_tables=[self.block_table],
            slot_mappings=places[None],
            kv_cache_config=self._cache_config,
            seq_lens_cpu_upper_bound=longest,
            positions=positions,
            is_prefilling=self._not_prefilling[:n],
        )
        mapping = dict.fromkeys((one.layer_name for one in self.layers.attention), places)
        with set_forward_context(
            metadata,
            self.config,
            num_tokens=n,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=mapping,
        ):
            yield positions

    def _attention_groups(self) -> list[list[Any]]:
        """Builders of attention metadata, of their own, since they keep buffers that the engine's pass may be using.
        They are made for the first pass: not every drafter has one."""
        if self._groups is None:
            names = {one.layer_name for one in self.layers.attention}
            self._groups, _, _ = init_attn_backend(
                self._cache_config, self.config, self.device, active_layer_names=names
            )
            if any(group.backend.get_name() == WAITING for of_cache in self._groups for group in of_cache):
                logger.warning(
                    "specplug: %s copies the lengths of texts to the host for each pass beside draft tokens, unless "
                    "its TRTLLM kernels are used, so each draft token may wait for the device; --attention-backend "
                    "names another",
                    WAITING,
                )
        return self._groups


def _is_complete(spec: Any) -> bool:
    """Whether the layers of a KV cache attend to the complete text. vLLM may keep windows in a cache of that kind."""
    return type(spec) is FullAttentionSpec and spec.sliding_window is None and spec.attention_chunk_size is None


def refuse_target_settings(vllm_config: Any, methods: Sequence[str]) -> None:
    """UsageError for a setting of vLLM with which a proposer cannot run the target's layers.

    methods  the proposers that do so
    EngineError for a release of vLLM whose KV cache was not read for them.
    """
    package = installed()
    against = None if package is None else against_target_layers(package)
    if against is not None:
        raise EngineError(f"{' and '.join(methods)}: {against}; install another, or remove it")
    name, parallel = " and ".join(methods), vllm_config.parallel_config
    refused = {
        "--enable-lora": vllm_config.lora_config is not None,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        # The pool would be freed with the weights, and not be filled again.
        "--enable-sleep-mode": "short_context" in methods and vllm_config.model_config.enable_sleep_mode,
    }
    for flag, is_set in refused.items():
        if is_set:
            raise UsageError(
                f"{name} runs the target's own layers, which does not work with {flag}; remove one of them"
            )
