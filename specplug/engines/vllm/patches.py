"""What of vLLM must be mended, while it runs, for drafts to leave its output as it is.

Knows the faults by trying them: a vLLM without them is left alone.
"""

from __future__ import annotations

from typing import Any

import torch


def mend_expansion() -> bool:
    """Make `expand_batch_to_tokens` right where it is wrong; whether it was.

    It repeats each request's temperature, top_k and top_p for its guesses. On a CPU without Triton, 0.32.0 writes them
    into a copy and returns memory that nobody has set (vllm-project/vllm issue 55005), so that any sampled request
    beside a draft, by whatever method, is drawn from noise, or the engine stops.
    """
    from vllm.v1.sample import rejection_sampler

    module: Any = rejection_sampler
    values, ends = torch.tensor([1.5, 2.5]), torch.tensor([1, 3], dtype=torch.int32)
    if module.expand_batch_to_tokens(values, ends, 3).tolist() == [1.5, 2.5, 2.5]:
        return False
    module.expand_batch_to_tokens = expand_batch_to_tokens
    return True


def mend_top_k() -> bool:
    """Make `apply_top_k_only` take no rows where it does not; whether it did not.

    A pass without any guess, as one that reads prompts is, goes through the rejection sampler, too. On a CPU without
    Triton, 0.32.0 then asks for the largest of no `top_k`, and the engine stops.
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
    """x[i] as often as `cu_num_tokens` grows at i, `replace_from` replaced; all in one dimension."""
    counts = torch.diff(cu_num_tokens.long(), prepend=torch.zeros(1, dtype=torch.long, device=x.device))
    expanded = torch.repeat_interleave(x, counts, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to) if replace_from != replace_to else expanded
