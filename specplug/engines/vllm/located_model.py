"""Resolves a model reference to what vLLM opens. Downloads nothing."""

from __future__ import annotations

import re
from pathlib import Path

from specplug.machine.folders import expanded
from specplug.models import hub_cache, hub_reference, references


def located_model(ref: str) -> Path:
    """The folder or file of a model. UsageError where it is not on this disk.

    ref  what `references.resolve` takes, or a repository of the hub as vLLM writes it: `org/name`. Of a packaged model
         in GGUF a checkpoint is made, if it is missing.
    """
    if ref.startswith("demo:"):
        from specplug.transforms.dequantise import checkpoint_of

        return checkpoint_of(ref)
    return references.resolve(hub_name(ref), "checkpoint")


def vllm_argument(ref: str) -> str:
    """What `vllm serve` takes for a reference: the path of a model on this disk, else `org/name`, which vLLM downloads.

    UsageError for a model that is missing and that vLLM cannot get by its name alone.
    """
    named = hub_name(ref)
    if named.startswith(hub_reference.PREFIX):
        wanted = hub_reference.parse(named)
        if hub_cache.cached(wanted, "checkpoint") is None and wanted == hub_reference.HubReference(wanted.repo):
            return wanted.repo
    return str(located_model(ref))


def hub_name(ref: str) -> str:
    """The reference; `hf:org/name` for a repository of the hub that is written `org/name`, as vLLM does."""
    is_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", ref) is not None and not expanded(ref).exists()
    return hub_reference.PREFIX + ref if is_name else ref


def served_name(ref: str) -> str | None:
    """The name under which clients know a model of the hub; None where vLLM's own choice fits."""
    named = hub_name(ref)
    return hub_reference.parse(named).repo if named.startswith(hub_reference.PREFIX) else None
