"""llama.cpp through llama-cpp-python.

Defines the public names, and imports llama_cpp only when one of them is used, so that `doctor` works without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from specplug.errors import EngineError

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.speculative_llama import SpeculativeLlama

__all__ = ["SpeculativeLlama", "require"]


def require() -> None:
    """Import llama_cpp. Raises EngineError where it is not installed or does not load, or would end the process."""
    from specplug.engines.llama_cpp.library_check import check_import

    check_import()
    try:
        import_module("llama_cpp")
    except ModuleNotFoundError as error:
        raise EngineError(f"llama-cpp-python is not installed ({error}): pip install 'specplug[llama-cpp]'") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(f"llama-cpp-python does not load ({error}); see specplug doctor") from None


def __getattr__(name: str) -> object:
    if name == "SpeculativeLlama":
        require()
        from specplug.engines.llama_cpp.speculative_llama import SpeculativeLlama

        return SpeculativeLlama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
