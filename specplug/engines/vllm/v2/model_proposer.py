"""The contract of proposers on the device that run passes of the target's own layers.

It is `DeviceProposer` with the target and the slots of requests. `DeviceDrafting` treats such a proposer like the
others: it fuses its chains, learns how often each bucket is accepted, and isolates its faults. With tensor parallelism
the modules of the target communicate, so every rank has to make the same calls in the same order: all ranks draft, and
nothing that a proposer does may depend on a clock or on what one rank alone knows. A fault on one rank would leave the
others waiting, or mix up their messages; there it is raised and stops the engine, as one of vLLM's own drafters does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from specplug.core import Bucket
from specplug.engines.vllm.draft_counters import Values
from specplug.engines.vllm.v2.device_chains import DeviceChains, DeviceStep, DeviceTexts

if TYPE_CHECKING:  # it imports vllm
    from specplug.engines.vllm.v2.target_layers import TargetLayers
    from specplug.engines.vllm.v2.target_model import TargetModel

Tensor = Any


class ModelProposer:
    """Implements `DeviceProposer`. Until `attach` was called, `propose` returns chains without tokens."""

    buckets: tuple[Bucket, ...]

    def attach(self, target: TargetModel) -> None:
        """The target is loaded and has its KV cache; called again when the engine allocates another cache.

        UsageError where the proposer cannot work with this target.
        """
        raise NotImplementedError

    def reserve(self, layers: TargetLayers, config: Any) -> None:
        """The model is loaded, and the size of the KV cache is not chosen yet: allocate what stays.

        config  vLLM's `VllmConfig`
        UsageError where it does not fit.
        """

    def begin(self, text: Tensor, num_tokens: int) -> None:
        """`begin_request` is called instead."""

    def begin_request(self, slot: int, known: Sequence[int]) -> None:
        """A request takes a slot; `known` are its tokens so far, on the host."""

    def observe(self, step: DeviceStep) -> None:
        """Learn from the tokens that a pass emitted; `step.slots` tells of which requests."""

    def propose(self, texts: DeviceTexts, k: int) -> DeviceChains:
        """A chain of at most k tokens for each request in `texts.running`, which the batch that the target follows has
        in the same order. K/V may be written for these requests alone."""
        raise NotImplementedError

    def values(self) -> Values:
        """What it counts on the host, by names and labels of `draft_counters.METRICS`."""
        return {}

    def end(self, text: Tensor, num_prompt: int, length: Tensor) -> None:
        """`end_request` is called instead."""

    def end_request(self, slot: int) -> None:
        """A request leaves its slot."""
