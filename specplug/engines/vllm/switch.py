"""What vLLM adds to its workers where one engine is to draft with several profiles in turn (`worker_extension_cls`).

Knows where a worker keeps its drafter.
"""

from __future__ import annotations

from typing import Any

SWITCH = f"{__name__}.Switch"
"""For `worker_extension_cls`."""


class Switch:
    """Called on every worker through `collective_rpc`."""

    model_runner: Any

    def specplug_use(self, ref: str, fresh: bool) -> None:
        """See `SpecplugProposer.use`."""
        self.model_runner.drafter.use(ref, fresh=fresh)
