"""Extends vLLM's workers (`worker_extension_cls`) so that one engine can draft with several profiles in turn."""

from __future__ import annotations

from typing import Any

SWITCH = f"{__name__}.ProfileSwitch"
"""The value for `worker_extension_cls`."""


class ProfileSwitch:
    """Methods that `collective_rpc` can call on every worker."""

    model_runner: Any

    def specplug_use(self, ref: str, fresh: bool) -> None:
        """Call `SpecplugProposer.use_profile` of this worker."""
        self.model_runner.drafter.use_profile(ref, fresh=fresh)
