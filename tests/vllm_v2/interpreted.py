"""Makes vLLM's V2 model runner run on a CPU: Triton's interpreter runs its kernels, and asynchronous scheduling stays
on.

Import it before vllm. Processes that vLLM starts import it, too, if `sitecustomize` does. CUDA graphs, streams and
speed are not what they are on a GPU.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TRITON_INTERPRET": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # several ranks compile for minutes otherwise
}
os.environ.update(VARIABLES)


def interpret_kernels() -> None:
    """Add a Triton backend for CPUs whose kernels are interpreted."""
    import numpy as np
    import triton.backends
    from triton.runtime.interpreter import InterpreterBuilder

    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
    # Comparisons of scalars give masks of integers, which the interpreter of Triton 3.9 refuses.
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(InterpreterBuilder, name, _with_bool_mask(getattr(InterpreterBuilder, name), place, np.bool_))


def keep_asynchronous() -> None:
    """Let the configuration decide about asynchronous scheduling, which vLLM switches off on CPUs. Imports vllm."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def kept(cls: Any, config: Any) -> None:
        wanted = config.scheduler_config.async_scheduling
        stock(cls, config)
        config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(kept)


def sort_instead_of_triton() -> None:
    """Cut to top_k and top_p with PyTorch: the interpreter cannot run vLLM's kernel for it. Imports vllm."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False


def write_tiny_model(
    folder: Path, *, num_tokens: int = 64, layers: int = 2, identity_from: int | None = None, family: str = "Llama"
) -> Path:
    """A model with random weights, whose greedy answers hardly repeat.

    identity_from  layers from this one on, counted from 0, add nothing to what they are given
    family         as transformers names its classes: Llama, Qwen2 or Qwen3
    """
    import torch
    import transformers

    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=num_tokens,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0.0, 0.25 if "lm_head" in name else 0.3)
        for layer in model.model.layers[layers if identity_from is None else identity_from :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def _with_bool_mask(call: Callable[..., Any], place: int, dtype: Any) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        args[place].data = args[place].data.astype(dtype)
        return call(self, *args, **kwargs)

    return wrapped


interpret_kernels()
