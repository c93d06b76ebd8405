"""vLLM: our proposers inside its stock engine. Nothing here imports vllm before `require` has said that it fits."""

from specplug.engines.vllm.versions import require

__all__ = ["require"]
