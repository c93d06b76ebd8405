"""Models with a trimmed head, as vLLM loads them for `method: draft_model` from what `specplug build vocab-trim` made.

Knows vLLM's classes for the same models, and changes nothing of them but the head. EAGLE-3 heads need none of this:
vLLM's own class reads a map of rows.
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

from specplug.engines.vllm.patches import mend_expansion, mend_top_k

logger = init_logger("vllm.specplug")


class TrimmedHead:
    """Stands before one of vLLM's classes, whose head it replaces; inherited from, since vLLM makes models by class.

    Keeps `lm_head` [rows, hidden], split among ranks as the whole one would be, and `d2t` int64[rows] on each of them.
    Ids outside the head get no probability: whatever is drawn from these logits, rejection sampling stays exact.
    """

    config: Any
    logits_processor: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if vllm_config.device_config.device_type == "cpu" and any([mend_expansion(), mend_top_k()]):
            logger.info("specplug: this vLLM samples wrongly beside drafts on the CPU; mended while it runs")
        if not get_pp_group().is_last_rank:
            return
        rows: int = self.config.draft_vocab_size
        whole = self.logits_processor
        self.lm_head = ParallelLMHead(
            rows,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        self.logits_processor = LogitsProcessor(rows, scale=whole.scale, soft_cap=whole.soft_cap)
        self.d2t = torch.nn.Parameter(torch.zeros(rows, dtype=torch.long), requires_grad=False)

    def compute_logits(self, hidden_states: Any) -> Any:
        """float[n, V]: of ids without a row, minus infinity. None on ranks that vLLM gathers nothing for."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is None:
            return None
        ids = self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)
        full = logits.new_full((len(logits), self.config.vocab_size), float("-inf"))
        full[:, ids] = logits
        return full

    def get_top_tokens(self, hidden_states: Any) -> Any:
        """int64[n]: the likeliest id; what vLLM calls with `use_local_argmax_reduction`."""
        top = self.logits_processor.get_top_tokens(self.lm_head, hidden_states)
        return top + self.d2t[top]


class SpecplugTrimmedLlamaForCausalLM(TrimmedHead, LlamaForCausalLM):  # type: ignore[misc]
    """Llama, and what is built like it."""


class SpecplugTrimmedQwen2ForCausalLM(TrimmedHead, Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen2 and Qwen2.5."""


class SpecplugTrimmedQwen3ForCausalLM(TrimmedHead, Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3, dense."""


class SpecplugTrimmedGemma3ForCausalLM(TrimmedHead, Gemma3ForCausalLM):  # type: ignore[misc]
    """Gemma 3 for text alone."""
