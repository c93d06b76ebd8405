"""Extends vLLM's workers (`worker_extension_cls`) so that one engine can draft with several profiles in turn."""

from __future__ import annotations

from typing import Any

SWITCH = f"{__name__}.ProfileSwitch"
"""The value for `worker_extension_cls`."""


class ProfileSwitch:
    """Methods that `collective_rpc` can call on every worker."""

    model_runner: Any

    def specplug_use(self, ref: str, fresh: bool) -> None:
        """Call `use_profile` of this worker's drafter (V1 runner) or speculator (V2)."""
        drafter = getattr(self.model_runner, "drafter", None) or self.model_runner.speculator
        if drafter is not None:  # with pipeline parallelism, only the last ranks draft
            drafter.use_profile(ref, fresh=fresh)
