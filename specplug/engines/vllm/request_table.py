"""What is known of each running request, by its id: rows of vLLM's batch move from step to step.

Knows token arrays and lengths. Imports no vllm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray, int_array

KEY = "specplug"
"""Ours in a request's `extra_args`: "off", or the most tokens of a draft."""


@dataclass(slots=True)
class Tracked:
    """A request that drafts are made for.

    seq    what the proposers call it
    known  tokens that they have seen
    limit  most tokens of a draft that it asks for; 0 when it wants none, and proposers never hear of it
    end    tokens of prompt and answer, at most
    sent   the draft that it was last given
    """

    seq: int
    known: int
    limit: int
    end: int
    last: int = -1
    sent: list[int] = field(default_factory=list)


class Requests:
    """Running requests by id. `seq` numbers are never used twice."""

    def __init__(self, max_model_len: int) -> None:
        self.max_model_len = max_model_len
        self._tracked: dict[str, Tracked] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._tracked)

    def get(self, request_id: str) -> Tracked | None:
        return self._tracked.get(request_id)

    def add(self, request_id: str, num_prompt: int, params: Any) -> Tracked:
        """A request seen for the first time; `params` are its sampling parameters, or None."""
        max_tokens = getattr(params, "max_tokens", None)
        end = self.max_model_len if max_tokens is None else min(self.max_model_len, num_prompt + max_tokens)
        limit = limit_of(getattr(params, "extra_args", None))
        tracked = self._tracked[request_id] = Tracked(self._next, 0, limit, end)
        self._next += 1
        return tracked

    def drop(self, request_id: str) -> Tracked:
        return self._tracked.pop(request_id)

    def finished(self, live: Collection[str] | Mapping[str, Any]) -> list[str]:
        """Ids that are no longer among the live ones."""
        return [request_id for request_id in self._tracked if request_id not in live]


def continues(tracked: Tracked, line: npt.NDArray[Any], num_tokens: int) -> bool:
    """Whether this row of tokens goes on where the request was left: an id may have been given again."""
    return 0 < tracked.known <= num_tokens and int(line[tracked.known - 1]) == tracked.last


def new_tokens(tracked: Tracked, line: npt.NDArray[Any], num_tokens: int) -> list[int]:
    """The tokens not yet seen; they count as seen now."""
    tokens: list[int] = line[tracked.known : num_tokens].tolist()
    tracked.known = num_tokens
    if tokens:
        tracked.last = tokens[-1]
    return tokens


def limit_of(extra_args: Any) -> int:
    """The most tokens of a draft that a request asks for. What cannot be read means no limit: drafts change nothing."""
    asked = extra_args.get(KEY) if isinstance(extra_args, dict) else None
    if asked == "off" or asked is False:
        return 0
    if isinstance(asked, dict):
        asked = asked.get("max_draft")
    if isinstance(asked, str) and asked.isdecimal():
        asked = int(asked)
    if isinstance(asked, int) and not isinstance(asked, bool):
        return max(0, asked)
    return 1 << 30


def prompt_of(line: npt.NDArray[Any], num_tokens: int) -> IntArray:
    """int32[n]: the tokens of a row, in an array of its own."""
    return int_array(np.array(line[:num_tokens], dtype=np.int32))
