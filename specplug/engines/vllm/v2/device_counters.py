"""Copies counters from the device to the host while later steps run, so that nobody waits for them.

It depends on torch alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Tensor = Any


class HostCopy:
    """Copies of tensors on the host, which are complete when the device has executed what was started before."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [_started_copy(one) for one in tensors]
        self._copied: Any = None
        if any(one.is_cuda for one in tensors):
            self._copied = torch.cuda.Event()
            self._copied.record()

    def is_complete(self) -> bool:
        return self._copied is None or bool(self._copied.query())

    def wait(self) -> list[Tensor]:
        """The copies, once they are complete."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copies


class DeviceCounters:
    """Call `poll` now and then: it returns the values of the copy that an earlier call started."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._copy: HostCopy | None = None

    def poll(self, counters: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Values as Python numbers or lists; None if there is no complete copy yet.

        counters  tensors by name; a new copy of them starts as soon as the earlier one is complete
        """
        values = None
        if self._copy is not None:
            if not self._copy.is_complete():
                return None
            values = {name: one.tolist() for name, one in zip(self._names, self._copy.wait(), strict=True)}
        self._names, self._copy = tuple(counters), HostCopy(list(counters.values()))
        return values


class DelayedCounters:
    """Call `poll` in every step: it returns the values of a fixed number of steps before.

    What a rank decides by them, all ranks decide in the same step. It waits for the device only where the host is more
    than that many steps ahead of it.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._copies: deque[HostCopy] = deque()

    def poll(self, counters: Tensor) -> Any | None:
        """Values as Python lists; None in the first steps."""
        self._copies.append(HostCopy([counters]))
        return self._copies.popleft().wait()[0].tolist() if len(self._copies) > self._steps else None


def _started_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
