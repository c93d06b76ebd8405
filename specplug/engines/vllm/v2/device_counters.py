"""Copies counters from the device to the host while later steps run, so that nobody waits for them.

It depends on torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        self._copied = None
        if any(tensor.is_cuda for tensor in counters.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return values


def _started_copy(tensor: Tensor) -> Tensor:
    """A copy on the host, which is complete when the device has executed what was started before."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
