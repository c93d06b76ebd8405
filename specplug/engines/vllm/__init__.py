"""Runs specplug's proposers inside stock vLLM. `require` checks the installed version before anything imports vllm."""

from specplug.engines.vllm.versions import require

__all__ = ["require"]
