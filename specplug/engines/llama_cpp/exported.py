"""Functions that llama.cpp's library exports under the names of their C++ declarations, without a public header.

A build may lack them, and llama-cpp-python's own module of them fails as a whole where one is missing. So each is
looked up here, and what needs one is refused where it is missing. Does not depend on a context or a model.
Source: src/llama-ext.h of github.com/ggml-org/llama.cpp; the names follow the C++ ABIs of Itanium and of Microsoft.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import llama_cpp.llama_cpp as ll

_FLOATS = ctypes.POINTER(ctypes.c_float)

SIGNATURES: dict[str, tuple[str, str, Sequence[Any], Any]] = {
    "llama_set_embeddings_layer_inp": (
        "P13llama_contextjb", "YAXPEAUllama_context@@I_N@Z", (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_bool), None,
    ),
    "llama_get_embeddings_layer_inp": (
        "P13llama_contextj", "YAPEAMPEAUllama_context@@I@Z", (ctypes.c_void_p, ctypes.c_uint32), _FLOATS,
    ),
    "llama_set_embeddings_nextn": (
        "P13llama_contextbb", "YAXPEAUllama_context@@_N1@Z", (ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool), None,
    ),
    "llama_get_embeddings_nextn": (
        "P13llama_context", "YAPEAMPEAUllama_context@@@Z", (ctypes.c_void_p,), _FLOATS,
    ),
    "llama_set_nextn_layer_offset": (
        "P13llama_contexti", "YAXPEAUllama_context@@H@Z", (ctypes.c_void_p, ctypes.c_int32), None,
    ),
}  # fmt: skip
"""By name: the arguments in the two mangled forms, then the types for ctypes."""


@cache
def exported(name: str) -> Callable[..., Any] | None:
    """The function of this name in `SIGNATURES`; None where the library lacks it."""
    itanium, microsoft, arguments, result = SIGNATURES[name]
    library: Any = getattr(ll, "_lib", None)
    for symbol in (name, f"_Z{len(name)}{name}{itanium}", f"?{name}@@{microsoft}"):
        function = getattr(library, symbol, None)
        if function is not None:
            function.argtypes, function.restype = list(arguments), result
            return function  # type: ignore[no-any-return]
    return None


def missing(names: Sequence[str]) -> list[str]:
    """Those of these functions that the library lacks."""
    return [name for name in names if exported(name) is None]
