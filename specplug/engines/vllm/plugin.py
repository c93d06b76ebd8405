"""What vLLM calls in each of its processes when it starts (the entry-point group `vllm.general_plugins`).

Knows which architectures are ours, by name: nothing of them is imported before a checkpoint asks for one.
"""

from __future__ import annotations

CLASSES = "specplug.engines.vllm.trimmed"


def register() -> None:
    """Tell vLLM the architectures that checkpoints with trimmed heads name. Again and again changes nothing more."""
    try:
        from vllm import ModelRegistry

        from specplug.transforms.checkpoint_head import TRIMMED

        for name in TRIMMED.values():
            ModelRegistry.register_model(name, f"{CLASSES}:{name}")
    except Exception as error:  # whoever runs vLLM without us must not find it broken by us
        import logging

        logging.getLogger("vllm.specplug").warning("specplug: drafters with trimmed heads cannot be loaded: %s", error)
