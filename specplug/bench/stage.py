"""The arms of a comparison, opened on one engine and ready to run.

`llama_stage` and `vllm_stage` build a Stage; `compare` chooses between them. This module imports neither engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specplug.bench.arms import Arm
from specplug.bench.interleaved import Explain
from specplug.bench.settings_gain import ArmSettings
from specplug.core import IntArray


@dataclass(frozen=True, slots=True)
class Stage:
    """Open arms, with the functions that turn text into tokens and back; `arms[0]` is plain decoding.

    explain     one for all arms, or one per arm
    about       the document's head: model, engine, hardware, versions, cost_curve
    references  per arm, the index of plain decoding under the same engine settings; arms[0] for all where None
    settings    the engine settings of the arms; None where all arms have the engine's own
    """

    arms: Sequence[Arm]
    encode: Callable[[Sequence[dict[str, str]]], IntArray]
    decode: Callable[[Sequence[int]], str]
    explain: Explain | Sequence[Explain]
    about: Mapping[str, Any]
    references: Sequence[int] | None = None
    settings: ArmSettings | None = None
