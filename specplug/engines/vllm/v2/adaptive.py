"""Tells whether vLLM's adaptive verification can be used: its own choice of the draft tokens to verify in each step.

It needs attention kernels whose full CUDA graphs take any number of rows per request. Source: config/vllm.py and
v1/attention of vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from specplug.errors import UsageError
from specplug.profile import Profile

CAPABILITIES = {9: "FlashAttention 3", 10: "FlashInfer"}
"""Major compute capability of GPUs to the kernels that vLLM uses there and that can do it."""

TRITON = "TRITON_ATTN"
"""An attention backend that can do it on all GPUs."""


def is_adaptive(profile: Profile, settings: Mapping[str, Any], notify: Callable[[str], None]) -> bool:
    """Whether vLLM is to choose the draft tokens to verify; says so, or why not.

    settings  how the engine is opened, without speculation
    UsageError where the profile demands what is not possible.
    """
    if profile.vllm.adaptive_verification is False or profile.planner.mode == "static":
        return False
    reason = reason_against(settings, gpu_capability())
    if reason is None:
        notify("vLLM's adaptive verification chooses the draft tokens to verify")
        return True
    if profile.vllm.adaptive_verification:
        raise UsageError(f"profile {profile.name} demands adaptive_verification, but {reason}; remove it")
    notify(f"vLLM's adaptive verification is off: {reason}")
    return False


def reason_against(settings: Mapping[str, Any], capability: tuple[int, int] | None) -> str | None:
    """Why adaptive verification is not possible with these settings of `vllm.LLM`; None if it is.

    capability  of the GPU; None without one
    """
    if capability is None:
        return "it needs CUDA graphs, and there is no CUDA GPU"
    if settings.get("enforce_eager"):
        return "it needs full CUDA graphs, and enforce_eager switches them off"
    if settings.get("enable_lora"):
        return "vLLM does not combine it with LoRA"
    if int(settings.get("pipeline_parallel_size") or 1) > 1:
        return "vLLM does not combine it with pipeline parallelism"
    if settings.get("attention_backend") == TRITON or capability[0] in CAPABILITIES:
        return None
    return (
        f"the attention kernels of compute capability {capability[0]}.{capability[1]} take a fixed number of rows in "
        f"full CUDA graphs; --attention-backend {TRITON} can do it, at its own speed"
    )


def gpu_capability() -> tuple[int, int] | None:
    """(major, minor) of the first GPU, without initialising CUDA; None without a CUDA GPU. Imports vllm."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    found = current_platform.get_device_capability()
    return None if found is None else (found.major, found.minor)
