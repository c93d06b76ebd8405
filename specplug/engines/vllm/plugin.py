"""The entry point that vLLM calls in each of its processes at start (group `vllm.general_plugins`).

What it registers is imported only when it is used: model architectures by a checkpoint that names one, and the
speculator by a configuration with specplug's key.
"""

from __future__ import annotations

MODULE = "specplug.engines.vllm.trimmed_head"


def register() -> None:
    """Register the architectures of trimmed heads, and the speculator. Calling it again changes nothing."""
    try:
        from vllm import ModelRegistry

        from specplug.transforms.checkpoint_head import TRIMMED

        for name in TRIMMED.values():
            ModelRegistry.register_model(name, f"{MODULE}:{name}")
        from specplug.engines.vllm.v2 import lookahead, runner_hook, scheduled_lengths

        runner_hook.install()
        scheduled_lengths.install()
        lookahead.install()
    except Exception as error:  # an error here would stop vLLM even for users who do not use specplug
        import logging

        logging.getLogger("vllm.specplug").warning(
            "specplug: trimmed heads and the V2 runner cannot be used: %s", error
        )
