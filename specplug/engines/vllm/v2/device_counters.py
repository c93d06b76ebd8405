"""Copies counters from the device to the host while later steps run, so that nobody waits for them.

It depends on torch alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch

Tensor = Any


class DeviceCounters:
    """Call `poll` now and then: it returns the values of the copy that an earlier call started."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] | None = None
        self._copied: Any = None

    def poll(self, counters: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Values as Python numbers or lists; None if there is no complete copy yet.

        counters  tensors by name; a new copy of them starts as soon as the earlier one is complete
        """
        values = None
        if self._copies is not None:
            if self._copied is not None and not self._copied.query():
                return None
            values = {name: copy.tolist() for name, copy in self._copies.items()}
        self._copies = {name: _started_copy(tensor) for name, tensor in counters.items()}
        self._copied = _recorded_event(counters.values())
        return values


class DelayedCounters:
    """Call `poll` in every step: it returns the values of a fixed number of steps before.

    What a rank decides by them, all ranks decide in the same step. It waits for the device only where the host is more
    than that many steps ahead of it.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._copies: deque[tuple[Tensor, Any]] = deque()

    def poll(self, counters: Tensor) -> Any | None:
        """Values as Python lists; None in the first steps."""
        self._copies.append((_started_copy(counters), _recorded_event([counters])))
        if len(self._copies) <= self._steps:
            return None
        copy, event = self._copies.popleft()
        if event is not None:
            event.synchronize()
        return copy.tolist()


def _recorded_event(tensors: Iterable[Tensor]) -> Any:
    """An event after what was started on the device; None where no tensor is on one."""
    if not any(tensor.is_cuda for tensor in tensors):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _started_copy(tensor: Tensor) -> Tensor:
    """A copy on the host, which is complete when the device has executed what was started before."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
