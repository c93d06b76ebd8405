"""Model classes with a trimmed head, which vLLM loads for `method: draft_model` from `specplug build vocab-trim`.

They change nothing of vLLM's own classes but the head. EAGLE-3 heads do not need them: vLLM's own class already reads a
map of rows.
Source: vllm/model_executor/models/{llama,qwen2,qwen3,gemma3}.py, 0.22 to 0.33.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from specplug.engines.vllm.patches import patch_apply_top_k_only, patch_expand_batch_to_tokens

logger = init_logger("vllm.specplug")


class TrimmedHead:
    """Replaces the head of the vLLM class that follows it in the list of bases.

    vLLM creates models by class, so the replacement is inherited.

    State: `lm_head` [rows, hidden], split among ranks like a full head, and `d2t` int64[rows] on every rank.
    Ids that the head has no row for get probability 0. Rejection sampling stays exact for any distribution of drafts.
    """

    config: Any
    logits_processor: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        on_cpu = vllm_config.device_config.device_type == "cpu"
        if on_cpu and any([patch_expand_batch_to_tokens(), patch_apply_top_k_only()]):
            logger.info("specplug: patched faults of this vLLM in sampling with drafts on CPUs, in memory only")
        if not get_pp_group().is_last_rank:
            return
        rows: int = self.config.draft_vocab_size
        full = self.logits_processor
        self.lm_head = ParallelLMHead(
            rows,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        self.logits_processor = LogitsProcessor(rows, scale=full.scale, soft_cap=full.soft_cap)
        self.d2t = torch.nn.Parameter(torch.zeros(rows, dtype=torch.long), requires_grad=False)

    def compute_logits(self, hidden_states: Any) -> Any:
        """float[n, V]: minus infinity for ids without a row. None on ranks that vLLM gathers no logits on."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is None:
            return None
        ids = self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)
        full = logits.new_full((len(logits), self.config.vocab_size), float("-inf"))
        full[:, ids] = logits
        return full

    def get_top_tokens(self, hidden_states: Any) -> Any:
        """int64[n]: the most likely ids. vLLM calls this with `use_local_argmax_reduction`."""
        top = self.logits_processor.get_top_tokens(self.lm_head, hidden_states)
        return top + self.d2t[top]


class SpecplugTrimmedLlamaForCausalLM(TrimmedHead, LlamaForCausalLM):  # type: ignore[misc]
    """Llama, and models with the same architecture."""


class SpecplugTrimmedQwen2ForCausalLM(TrimmedHead, Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen2 and Qwen2.5."""


class SpecplugTrimmedQwen3ForCausalLM(TrimmedHead, Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3, dense models only."""


class SpecplugTrimmedGemma3ForCausalLM(TrimmedHead, Gemma3ForCausalLM):  # type: ignore[misc]
    """Gemma 3, text-only models."""
