"""Runtime patches for faults in vLLM's sampler that change its output, or stop it, when drafts are present.

Each patch first checks whether the fault is present; a vLLM without it is left unchanged.
"""

from __future__ import annotations

from typing import Any

import torch


def patch_expand_batch_to_tokens() -> bool:
    """Replace vLLM's `expand_batch_to_tokens` if it is faulty. Returns whether it was replaced.

    The function repeats each request's temperature, top_k and top_p for its draft tokens. On a CPU without Triton,
    vLLM 0.32.0 writes them into a copy and returns uninitialised memory (vllm-project/vllm issue 55005). Sampled
    requests in a batch with drafts, by any method, are then drawn from noise, or the engine stops.
    """
    from vllm.v1.sample import rejection_sampler

    module: Any = rejection_sampler
    values, ends = torch.tensor([1.5, 2.5]), torch.tensor([1, 3], dtype=torch.int32)
    if module.expand_batch_to_tokens(values, ends, 3).tolist() == [1.5, 2.5, 2.5]:
        return False
    module.expand_batch_to_tokens = expand_batch_to_tokens
    return True


def patch_apply_top_k_only() -> bool:
    """Make vLLM's `apply_top_k_only` accept an input without rows if it does not. Returns whether it was replaced.

    A pass without draft tokens, for example one that only reads prompts, also goes through the rejection sampler. On a
    CPU without Triton, vLLM 0.32.0 then computes the maximum of an empty `top_k`, and the engine stops.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    module: Any = topk_topp_sampler
    apply = module.apply_top_k_only
    try:
        apply(torch.empty(0, 2), torch.empty(0, dtype=torch.int32))
    except (IndexError, RuntimeError):
        module.apply_top_k_only = lambda logits, k: apply(logits, k) if len(logits) else logits
        return True
    return False


def expand_batch_to_tokens(
    x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Any:
    """Repeat x[i] for each token of request i, and replace `replace_from` by `replace_to`.

    x              [n]  one value per request
    cu_num_tokens  [n]  cumulative number of tokens of the requests
    """
    counts = torch.diff(cu_num_tokens.long(), prepend=torch.zeros(1, dtype=torch.long, device=x.device))
    expanded = torch.repeat_interleave(x, counts, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to) if replace_from != replace_to else expanded
