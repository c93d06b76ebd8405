"""Tracks each running request by its id, because rows of vLLM's batch change places from step to step.

It works on arrays of tokens and lengths, and imports no vllm.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray, int_array

KEY = "specplug"
"""The key in a request's `extra_args` for its options."""

UNLIMITED = 1 << 30

LONGEST_OPTIONS = 200
"""Characters. Longer options are ignored: they come from clients, and are read in the engine's process."""


@dataclass(slots=True)
class TrackedRequest:
    """A request that can get drafts.

    seq           its sequence id for the proposers
    num_seen      tokens that the proposers have received
    max_draft     the longest draft that it asks for, in tokens; at 0 the proposers never receive the request
    max_length    the most tokens that prompt and answer can have together
    last_token    the last token that the proposers have received
    draft_owners  the proposer of each token of its latest draft, by index; -1 where several proposed it
    """

    seq: int
    num_seen: int
    max_draft: int
    max_length: int
    last_token: int = -1
    draft_owners: list[int] = field(default_factory=list)


class RequestTable:
    """Running requests by id. A sequence id is never used twice."""

    def __init__(self, max_model_len: int) -> None:
        self.max_model_len = max_model_len
        self._tracked: dict[str, TrackedRequest] = {}
        self._next_seq = 0

    def __len__(self) -> int:
        return len(self._tracked)

    def get(self, request_id: str) -> TrackedRequest | None:
        return self._tracked.get(request_id)

    def add(self, request_id: str, num_prompt: int, params: Any) -> TrackedRequest:
        """Add a new request; `params` are its sampling parameters, or None."""
        max_tokens = getattr(params, "max_tokens", None)
        max_length = self.max_model_len if max_tokens is None else min(self.max_model_len, num_prompt + max_tokens)
        max_draft = max_draft_of(getattr(params, "extra_args", None))
        tracked = self._tracked[request_id] = TrackedRequest(self._next_seq, 0, max_draft, max_length)
        self._next_seq += 1
        return tracked

    def drop(self, request_id: str) -> TrackedRequest:
        return self._tracked.pop(request_id)

    def finished(self, live: Collection[str] | Mapping[str, Any]) -> list[str]:
        """Ids of tracked requests that are not in `live`."""
        return [request_id for request_id in self._tracked if request_id not in live]


def continues(tracked: TrackedRequest, line: npt.NDArray[Any], num_tokens: int) -> bool:
    """Whether this row's tokens continue the tracked request. If not, its id was reused for another request."""
    return 0 < tracked.num_seen <= num_tokens and int(line[tracked.num_seen - 1]) == tracked.last_token


def new_tokens(tracked: TrackedRequest, line: npt.NDArray[Any], num_tokens: int) -> list[int]:
    """The tokens that the proposers have not received yet, which are marked as received."""
    tokens: list[int] = line[tracked.num_seen : num_tokens].tolist()
    tracked.num_seen = num_tokens
    if tokens:
        tracked.last_token = tokens[-1]
    return tokens


def max_draft_of(extra_args: Any) -> int:
    """The longest draft that a request asks for, in tokens.

    The options are a mapping with the keys of a request to specplug's own server, `mode` (off or auto) and `max_draft`,
    or that mapping as JSON, because vLLM's server passes no mappings on. "off" and a number are short for it.
    A value that cannot be read means no limit: the request is still answered, since drafts do not change the output.
    """
    asked = extra_args.get(KEY) if isinstance(extra_args, dict) else None
    if isinstance(asked, str) and len(asked) > LONGEST_OPTIONS:
        return UNLIMITED
    if isinstance(asked, str) and asked.lstrip().startswith("{"):
        try:
            asked = json.loads(asked)
        except ValueError:
            return UNLIMITED
    if isinstance(asked, dict):
        asked = "off" if asked.get("mode") == "off" else asked.get("max_draft")
    if asked == "off" or asked is False:
        return 0
    if isinstance(asked, str) and asked.isdecimal() and len(asked) <= LONGEST_OPTIONS:
        asked = int(asked)
    if isinstance(asked, int) and not isinstance(asked, bool):
        return max(0, asked)
    return UNLIMITED


def prompt_of(line: npt.NDArray[Any], num_tokens: int) -> IntArray:
    """int32[n]: a copy of a row's first tokens."""
    return int_array(np.array(line[:num_tokens], dtype=np.int32))
