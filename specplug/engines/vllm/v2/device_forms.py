"""Finds the form of a proposer that drafts on the device.

A proposer of a third party may have a method `device_form(num_tokens, device)` that returns a `DeviceProposer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specplug.core import Proposer
from specplug.proposers.datastore import Datastore
from specplug.proposers.early_exit import EarlyExit
from specplug.proposers.short_context import ShortContext
from specplug.proposers.suffix import Suffix
from specplug.proposers.token_recycling import TokenRecycling
from specplug.registry import name_of

METHOD = "device_form"

OWN = Suffix | TokenRecycling | Datastore | EarlyExit | ShortContext
"""specplug's proposers that have such a form."""

RUN_THE_TARGET = (EarlyExit, ShortContext)
"""Those whose form is a `ModelProposer`."""


def without_device_form(proposers: Sequence[Proposer]) -> list[str]:
    """What drafts on the host only, by name. On the device, all requests draft from the same corpora."""
    return [
        f"{name_of(one)} with corpora that requests choose" if isinstance(one, Datastore) else name_of(one)
        for one in proposers
        if not hasattr(one, METHOD) and (not isinstance(one, OWN) or (isinstance(one, Datastore) and one.by_request))
    ]


def running_the_target(proposers: Sequence[Proposer]) -> list[str]:
    """What runs the target's own layers to draft, by name."""
    return [name_of(one) for one in proposers if isinstance(one, RUN_THE_TARGET)]


def device_form(proposer: Proposer, num_tokens: int, device: Any) -> Any:
    """The `DeviceProposer` for a proposer that is not in `without_device_form`.

    num_tokens  size of the vocabulary
    UsageError for corpora that do not fit into their memory, or that are damaged.
    """
    from specplug.engines.vllm.v2.device_datastore import DeviceDatastore
    from specplug.engines.vllm.v2.device_early_exit import DeviceEarlyExit
    from specplug.engines.vllm.v2.device_short_context import DeviceShortContext
    from specplug.engines.vllm.v2.device_suffix import DeviceSuffix
    from specplug.engines.vllm.v2.successors import Successors

    if isinstance(proposer, Datastore):
        return DeviceDatastore(proposer, device)
    if isinstance(proposer, EarlyExit):
        return DeviceEarlyExit(proposer, num_tokens, device)
    if isinstance(proposer, ShortContext):
        return DeviceShortContext(proposer, num_tokens, device)
    if isinstance(proposer, Suffix):
        return DeviceSuffix(proposer, device)
    if isinstance(proposer, TokenRecycling):
        return Successors(proposer, num_tokens, device)
    return getattr(proposer, METHOD)(num_tokens, device)
