"""What the server asks of an engine.

Knows no engine; `specplug.engines.llama_cpp.serving_engine.ServingEngine` is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.generation.answers import Sampling
from specplug.profile import Profile
from specplug.server.scheduler import Loop


class CountingLoop(Loop, Protocol):
    """A loop that counts guesses by proposer and by place in the draft, and time beside what plain decoding takes."""

    decode_ms: float
    plain_ms: float

    @property
    def guessed(self) -> npt.NDArray[np.int64]: ...

    @property
    def accepted(self) -> npt.NDArray[np.int64]: ...


class Engine(Protocol):
    """A model with a profile, opened for `slots` answers at once.

    max_context  tokens that one answer may come to, its prompt included
    kv_tokens    tokens that all of them together may hold
    """

    profile: Profile
    slots: int
    max_context: int
    kv_tokens: int

    @property
    def loop(self) -> CountingLoop: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def end_tokens(self) -> frozenset[int]: ...

    @property
    def carries_tools(self) -> bool: ...

    @property
    def source_names(self) -> list[str]: ...

    @property
    def knows_plain_ms(self) -> bool: ...

    def sampler(self, sampling: Sampling) -> Any: ...

    def tokenize(self, text: str, *, add_special: bool = True) -> IntArray: ...

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> IntArray: ...

    def piece(self, token: int) -> bytes: ...

    def text(self, tokens: Sequence[int]) -> str: ...
