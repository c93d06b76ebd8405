"""Lets vLLM allocate blocks for draft tokens, where a proposer writes their keys and values to the target's cache.

vLLM does so for its own drafters that are models, and for no others. Without it the chains would end with the last
block of a request, and nothing else would change. Source: `num_lookahead_tokens` in vllm/config/vllm.py, 0.32.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from specplug.engines.vllm.configure import KEY, V2_METHOD, profile_in
from specplug.errors import SpecplugError

NAME = "num_lookahead_tokens"
METHOD = "early_exit"
"""The proposer that writes to the target's cache."""

MARK = "wrapped_by_specplug"


def install() -> None:
    """Wrap the property of vLLM's configuration. Calling it again changes nothing; a vLLM without it is left alone."""
    try:
        config: Any = import_module("vllm.config").VllmConfig
        stock = getattr(config, NAME)
    except (ImportError, AttributeError):
        return
    if not isinstance(stock, property) or stock.fget is None or getattr(stock.fget, MARK, False):
        return
    wrapped = stock.fget

    def num_lookahead_tokens(self: Any) -> int:
        return max(int(wrapped(self)), _own(self))

    setattr(num_lookahead_tokens, MARK, True)
    setattr(config, NAME, property(num_lookahead_tokens, doc=stock.__doc__))


def _own(config: Any) -> int:
    """Draft tokens for which specplug needs blocks. A profile that cannot be read is reported by the worker."""
    own, speculation = config.additional_config, config.speculative_config
    if not isinstance(own, dict) or KEY not in own or speculation is None or speculation.method != V2_METHOD["method"]:
        return 0
    try:
        writes = any(spec.method == METHOD for spec in profile_in(own).proposers)
    except SpecplugError:
        return 0
    return int(speculation.num_speculative_tokens) if writes else 0
