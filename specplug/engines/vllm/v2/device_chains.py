"""The data that proposers on the device work on: running texts, what a pass emitted, and chains of draft tokens.

Shapes depend only on what the host knows without waiting for the device: the number of requests, the longest chain, and
a bound on the length of the texts. So nothing here is read back in the step that made it; a `ModelProposer` copies some
of it to the host and uses it a fixed number of steps later. The module does not depend on vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from specplug.core import Bucket

NONE = -1
"""Where a chain has no draft token."""

MOST_POSITIONS = 1 << 22
"""Tokens of all texts of a batch that are looked at together: each takes about 30 bytes while a step drafts."""

LEAST_WINDOW = 1024
"""Tokens of each text that are looked at in any case."""

Tensor = Any
"""torch.Tensor. Shapes and types are in the docstrings."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTexts:
    """The texts of the requests of a batch, at the end of a pass.

    slots    int64[n]     the row of `tokens` of each request
    tokens   int32[S, L]  the texts of all slots, prompt and answer
    lengths  int32[S]     tokens of each text
    width    no text of which a pass emitted a token is longer
    running  bool[n]      the requests of which a pass emitted a token; None for all of them
    wanted   no more draft tokens of a chain are used; None where that is not known
    """

    slots: Tensor
    tokens: Tensor
    lengths: Tensor
    width: int
    running: Tensor | None = None
    wanted: int | None = None
    _row_lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        lengths = self.lengths.index_select(0, self.slots).long().clamp(max=self.width)
        object.__setattr__(self, "_row_lengths", lengths)

    def window(self) -> tuple[Tensor, Tensor]:
        """int32[n, w] and int64[n]: the texts of the batch and their lengths; of long texts in a large batch the last
        tokens, so that no more than MOST_POSITIONS are looked at."""
        lengths = self.row_lengths()
        most = max(LEAST_WINDOW, MOST_POSITIONS // len(self.slots))
        if self.width <= most:
            return self.tokens[:, : self.width].index_select(0, self.slots), lengths
        start = (lengths - most).clamp(min=0)
        places = start[:, None] + torch.arange(most, device=start.device)
        return self.tokens[self.slots[:, None], places], lengths - start

    def tail(self, count: int) -> Tensor:
        """int64[n, count]: the last tokens of each text, the last one first; -1 before its start."""
        places = self._row_lengths[:, None] - 1 - torch.arange(count, device=self.slots.device)
        found = self.tokens[self.slots[:, None], places.clamp(min=0)].long()
        return found.masked_fill(places < 0, -1)

    def last(self) -> Tensor:
        """int64[n]: the last token of each text."""
        return self.tokens[self.slots, (self.row_lengths() - 1).clamp(min=0)].long()

    def row_lengths(self) -> Tensor:
        """int64[n], at most `width`: a prompt that is still being read may be longer."""
        return self._row_lengths


@dataclass(frozen=True, slots=True, eq=False)
class DeviceStep:
    """What one pass emitted, and the target's likeliest ids.

    before   int64[n, m]  the tokens that the emitted ones follow; 0 where there is none
    after    int64[n, m]  the emitted tokens; 0 where there is none
    emitted  bool[n, m]   which of them exist
    read     int64[r]     tokens that the pass read, one per row of logits
    top      int64[r]     the target's likeliest id after each of `read`
    kept     bool[r]      whether that row is on the path of the emitted tokens
    slots    int64[n]     the slot of each request
    """

    before: Tensor
    after: Tensor
    emitted: Tensor
    read: Tensor | None = None
    top: Tensor | None = None
    kept: Tensor | None = None
    slots: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DeviceChains:
    """One chain per request.

    tokens   int64[n, k]  the draft tokens, then NONE
    buckets  int64[n, k]  why each was drafted: an index into the proposer's `buckets`; any valid one past the end
    """

    tokens: Tensor
    buckets: Tensor


class DeviceProposer(Protocol):
    """Drafts chains for a batch on the device.

    No method may wait for a tensor's values on the host, except for copies that an earlier step started (see
    `ModelProposer`). Calls arrive in the order in which the device executes them.
    """

    buckets: tuple[Bucket, ...]

    def begin(self, text: Tensor, num_tokens: int) -> None:
        """A request starts.

        text  int32[L], of which the first `num_tokens` are its prompt
        """

    def observe(self, step: DeviceStep) -> None:
        """Learn from the tokens that a pass emitted."""

    def propose(self, texts: DeviceTexts, k: int) -> DeviceChains:
        """A chain of at most k tokens for each request."""

    def end(self, text: Tensor, num_prompt: int, length: Tensor) -> None:
        """A request leaves its slot: it is finished, or it was preempted and will start again.

        text    int32[L]
        length  int32[]  tokens of the text
        """
