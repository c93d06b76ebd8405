"""The entry point that vLLM calls in each of its processes at start (group `vllm.general_plugins`).

It registers model architectures by name: their module is imported only when a checkpoint names one of them.
"""

from __future__ import annotations

MODULE = "specplug.engines.vllm.trimmed_head"


def register() -> None:
    """Register the architectures that checkpoints with trimmed heads name. Calling it again changes nothing."""
    try:
        from vllm import ModelRegistry

        from specplug.transforms.checkpoint_head import TRIMMED

        for name in TRIMMED.values():
            ModelRegistry.register_model(name, f"{MODULE}:{name}")
    except Exception as error:  # an error here would stop vLLM even for users who do not use specplug
        import logging

        logging.getLogger("vllm.specplug").warning("specplug: drafters with trimmed heads cannot be loaded: %s", error)
