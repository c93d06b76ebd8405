"""Tracks each running request by its id, because rows of vLLM's batch change places from step to step.

It works on arrays of tokens and lengths, and imports no vllm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import NO_OPTIONS, IntArray, SequenceOptions, int_array
from specplug.engines.vllm.request_options import request_options


@dataclass(slots=True)
class TrackedRequest:
    """A request that can get drafts.

    seq           its sequence id for the proposers
    num_seen      tokens that the proposers have received
    max_draft     the longest draft that it asks for, in tokens; at 0 the proposers never receive the request
    max_length    the most tokens that prompt and answer can have together
    options       what it asks of the proposers
    last_token    the last token that the proposers have received
    draft_owners  the proposer of each token of its latest draft, by index; -1 where several proposed it
    """

    seq: int
    num_seen: int
    max_draft: int
    max_length: int
    options: SequenceOptions = NO_OPTIONS
    last_token: int = -1
    draft_owners: list[int] = field(default_factory=list)


class RequestTable:
    """Running requests by id. A sequence id is never used twice."""

    def __init__(
        self,
        max_model_len: int,
        *,
        offered: Callable[[], Collection[str]] = tuple,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        offered  returns the names of the corpora that a request may ask for
        warn     receives, once per kind, why a request does not get what it asks for
        """
        self.max_model_len = max_model_len
        self._offered = offered
        self._warn = warn
        self._warned: set[str] = set()
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
        asked = request_options(getattr(params, "extra_args", None), self._offered())
        if asked.problem is not None and asked.problem not in self._warned:
            self._warned.add(asked.problem)
            self._warn(f"a request gets no drafts from corpora: {asked.problem}; its answer is not affected")
        tracked = TrackedRequest(self._next_seq, 0, asked.max_draft, max_length, asked.sequence)
        self._tracked[request_id] = tracked
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


def prompt_of(line: npt.NDArray[Any], num_tokens: int) -> IntArray:
    """int32[n]: a copy of a row's first tokens."""
    return int_array(np.array(line[:num_tokens], dtype=np.int32))
