"""Checks what specplug calls and replaces in vLLM's V2 model runner against the signatures that it was written for."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from specplug.engines.vllm.versions import changed

PROPOSE = (
    *("self", "input_batch", "attn_metadata", "slot_mappings", "last_hidden_states", "aux_hidden_states"),
    *("num_sampled", "num_rejected", "last_sampled", "next_prefill_tokens", "temperature", "seeds", "dp_sync_state"),
    *("dummy_run", "skip_attn_for_dummy_run", "mm_inputs", "is_profile", "num_speculative_tokens"),
)

STATES = ("all_token_ids", "total_len", "num_computed_tokens_np", "req_id_to_index")
"""Attributes of the request states that are read."""

BATCH = (
    *("num_reqs", "idx_mapping", "input_ids", "logits_indices"),
    *("expanded_idx_mapping", "expanded_local_pos", "seq_lens_cpu_upper_bound", "idx_mapping_np"),
    *("num_computed_prefill_tokens_np", "num_scheduled_tokens", "prefill_len_np"),
)
"""Fields of a batch that are read."""


METADATA = (
    *("attn_groups", "num_reqs", "num_tokens", "query_start_loc_gpu", "query_start_loc_cpu", "max_query_len"),
    *("seq_lens", "max_seq_len", "block_tables", "slot_mappings", "kv_cache_config", "seq_lens_cpu_upper_bound"),
    *("positions", "is_prefilling"),
)
"""Parameters of the function that makes the metadata of attention."""

TABLES = ("input_block_tables", "num_blocks", "block_tables")
"""Attributes of the block tables that are read."""


def check_target_interface() -> None:
    """EngineError, as below, for what is called to run the target's own layers. Imports vllm."""
    from vllm.v1.worker.gpu import attn_utils
    from vllm.v1.worker.gpu.block_table import BlockTables

    wanted = ("kv_cache_config", "vllm_config", "device", "active_layer_names")
    _same("init_attn_backend", attn_utils, "init_attn_backend", wanted, more=True)
    lacking = {*METADATA} - inspect.signature(attn_utils.build_attn_metadata).parameters.keys()
    if lacking:
        raise changed(f"build_attn_metadata, which has no {' and no '.join(sorted(lacking))}")
    source = inspect.getsource(BlockTables.__init__)
    for name in TABLES:
        if f"self.{name}" not in source:
            raise changed(f"BlockTables.{name}")


def check_v2_interface() -> None:
    """EngineError, with its name, when a part of vLLM that is called or replaced has changed. Imports vllm."""
    from vllm.v1.worker.gpu import spec_decode
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
    from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
    from vllm.v1.worker.gpu.states import RequestState

    _same("init_speculator", spec_decode, "init_speculator", ("vllm_config", "device", "req_states"))
    _same("BaseSpeculator.propose", BaseSpeculator, "propose", PROPOSE)
    _same("BaseSpeculator.init_cudagraph_manager", BaseSpeculator, "init_cudagraph_manager", ("self", "cudagraph_mode"))
    _same("BaseSpeculator.capture", BaseSpeculator, "capture", ("self",))
    _same("Sampler.__call__", Sampler, "__call__", ("self", "logits", "input_batch"))
    _same("Sampler.add_request", Sampler, "add_request", ("self", "req_idx", "sampling_params"))
    _same("RejectionSampler.__call__", RejectionSampler, "__call__", ("self", "logits", "input_batch"), more=True)
    _same(
        "RequestState.add_request",
        RequestState,
        "add_request",
        ("self", "req_id", "prompt_len", "all_token_ids", "num_computed_tokens", "max_tokens"),
    )
    _same("RequestState.remove_request", RequestState, "remove_request", ("self", "req_id"))
    source = inspect.getsource(RequestState.__init__)
    for name in STATES:
        if f"self.{name} " not in source and f"self.{name}:" not in source:
            raise changed(f"RequestState.{name}")
    for name in BATCH:
        if name not in InputBatch.__dataclass_fields__:
            raise changed(f"InputBatch.{name}")


def _same(name: str, owner: Any, method: str, wanted: Sequence[str], *, more: bool = False) -> None:
    """EngineError unless the method has these parameters; with `more`, further ones may follow."""
    function = getattr(owner, method, None)
    if function is None:
        raise changed(name)
    function = inspect.unwrap(function)
    found = tuple(inspect.signature(function).parameters)
    if (found[: len(wanted)] if more else found) != tuple(wanted):
        raise changed(f"{name}({', '.join(found)}) where ({', '.join(wanted)}) was expected")
