"""Finds settings of a profile that have no effect on this build of llama.cpp, or a bad one on this model.

Changes no setting, and judges none by its speed.
"""

from __future__ import annotations

from specplug.engines.llama_cpp.engine_settings import can_offload
from specplug.engines.llama_cpp.model import Model
from specplug.profile import Runtime


def setting_warnings(model: Model, runtime: Runtime) -> list[str]:
    """One sentence for each such setting."""
    found = []
    if runtime.gpu_layers and not can_offload():
        layers = "all" if runtime.gpu_layers < 0 else runtime.gpu_layers
        found.append(
            f"gpu_layers {layers} has no effect: this llama.cpp is built without GPU support (see specplug doctor and "
            "docs/how-to/gpu.md)"
        )
    if 0 < model.train_context < runtime.context:
        found.append(
            f"a context of {runtime.context} tokens is more than the {model.train_context} that {model.path.name} was "
            "trained for: answers get worse beyond that"
        )
    return found
