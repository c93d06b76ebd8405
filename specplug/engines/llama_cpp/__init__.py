"""llama.cpp through llama-cpp-python.

Knows what is public here. Imports llama_cpp only when that is asked for, so that `doctor` works without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.speculative_llama import SpeculativeLlama

__all__ = ["SpeculativeLlama"]


def __getattr__(name: str) -> object:
    if name == "SpeculativeLlama":
        from specplug.engines.llama_cpp.speculative_llama import SpeculativeLlama

        return SpeculativeLlama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
