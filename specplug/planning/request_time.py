"""The time of a whole request under one engine setting: reading its prompt, then its tokens.

Works on measured times of passes. Measures nothing, and does not depend on an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specplug.core import FloatArray
from specplug.profile import CostPoints

ALL_ROWS = 25
"""The most rows for which passes are compared with passes of one row: those of the largest draft of `default`. A
setting whose passes agree up to them counts as one that never rounds differently."""


@dataclass(frozen=True, slots=True)
class SettingCosts:
    """The measured times of passes under one engine setting.

    contexts    tokens in the cache, ascending
    rows        row counts, ascending from 1
    ms          milliseconds of a pass: ms[i][j] with contexts[i] tokens in the cache and rows[j] rows
    prompt_ms   milliseconds to read one token of a prompt, at each of the contexts
    equal_rows  passes of 1, 2, ... up to this many rows give a row the same logits, to the last bit; 1 where already
                two rows differ
    """

    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    prompt_ms: tuple[float, ...]
    equal_rows: int

    @property
    def points(self) -> CostPoints:
        return CostPoints(self.contexts, self.rows, self.ms)

    def as_mapping(self) -> dict[str, Any]:
        """Plain data, for journals and documents."""
        return {
            "contexts": list(self.contexts),
            "rows": list(self.rows),
            "ms": [list(line) for line in self.ms],
            "prompt_ms": list(self.prompt_ms),
            "equal_rows": self.equal_rows,
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> SettingCosts:
        """The inverse of `as_mapping`. Raises KeyError, TypeError or ValueError for other data."""
        return cls(
            tuple(map(int, data["contexts"])),
            tuple(map(int, data["rows"])),
            tuple(tuple(map(float, line)) for line in data["ms"]),
            tuple(map(float, data["prompt_ms"])),
            int(data["equal_rows"]),
        )

    def reading_ms(self, tokens: int) -> float:
        """Milliseconds to read a prompt of so many tokens: the time per token grows with what is cached before it."""
        at = np.linspace(0, tokens, 17)
        per_token = _interpolated(at, self.contexts, self.prompt_ms)
        return float(np.sum(np.diff(at) * (per_token[1:] + per_token[:-1]) / 2))

    def plain_ms(self, prompt: int, tokens: int) -> float:
        """Milliseconds to read a prompt of `prompt` tokens and to generate `tokens` more without drafts."""
        one_row = [line[0] for line in self.ms]
        at = np.linspace(prompt, prompt + tokens, 17)
        return self.reading_ms(prompt) + tokens * float(np.mean(_interpolated(at, self.contexts, one_row)))


def _interpolated(at: FloatArray, contexts: Sequence[int], values: Sequence[float]) -> FloatArray:
    """Linear between the contexts, constant below the first, and with the last slope beyond the last."""
    found: FloatArray = np.interp(at, contexts, values)
    if len(contexts) > 1:
        slope = max(0.0, (values[-1] - values[-2]) / (contexts[-1] - contexts[-2]))
        found = found + slope * np.maximum(0.0, at - contexts[-1])
    return found
