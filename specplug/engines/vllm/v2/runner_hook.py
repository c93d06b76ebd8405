"""Puts specplug's speculator into vLLM's V2 model runner, where the engine's configuration asks for it.

vLLM has no registry of speculators. It builds them in one function, which is replaced here: for a configuration with
specplug's key it builds ours, and otherwise it does what it did. The samplers are wrapped once, since a speculator is
not shown logits. So are the loading of the model and the allocation of the KV cache, for proposers that run the
target's layers: after the one they take the memory that they need, after the other they get at the cache.
Source: vllm/v1/worker/gpu, releases in versions.V2_SUPPORTED.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from specplug.engines.vllm.configure import KEY, V2_METHOD

PACKAGE = "vllm.v1.worker.gpu.spec_decode"
RUNNER = "vllm.v1.worker.gpu.model_runner"
MARK = "wrapped_by_specplug"

ATTRIBUTE = "specplug_speculator"
"""The attribute of a runner's request states by which the wrapped samplers find the speculator."""


def install() -> None:
    """Replace vLLM's `init_speculator`. Calling it again changes nothing; a vLLM without the V2 runner is left
    alone."""
    from importlib import import_module

    try:
        package: Any = import_module(PACKAGE)
        stock = package.init_speculator
    except (ImportError, AttributeError):
        return
    if getattr(stock, MARK, False):
        return

    @wraps(stock)
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        own = vllm_config.additional_config
        if not isinstance(own, dict) or KEY not in own or vllm_config.speculative_config.method != V2_METHOD["method"]:
            return stock(vllm_config, device, req_states)
        return _speculator(vllm_config, device, req_states)

    setattr(init_speculator, MARK, True)
    package.init_speculator = init_speculator
    runner: Any = sys.modules.get(RUNNER)
    if runner is not None:  # it has imported the function by name
        runner.init_speculator = init_speculator


def _speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
    """EngineError, with the name of the difference, for a vLLM with another interface."""
    from specplug.engines.vllm.v2.device_speculator import DeviceSpeculator
    from specplug.engines.vllm.v2.v2_interface import check_v2_interface

    check_v2_interface()
    _wrap_samplers()
    _wrap_runner()
    speculator = DeviceSpeculator(vllm_config, device, req_states)
    setattr(req_states, ATTRIBUTE, speculator)
    return speculator


def _wrap_samplers() -> None:
    """Show the speculator the logits of every pass, and the sampling parameters of every request."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    if getattr(Sampler, MARK, False):
        return
    sample, reject, add = Sampler.__call__, RejectionSampler.__call__, Sampler.add_request

    @wraps(sample)
    def sample_observed(self: Any, logits: Any, input_batch: Any) -> Any:
        _observe(self.req_states, logits, input_batch)
        return sample(self, logits, input_batch)

    @wraps(reject)
    def reject_observed(self: Any, logits: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        _observe(self.sampler.req_states, logits, input_batch)
        return reject(self, logits, input_batch, *args, **kwargs)

    @wraps(add)
    def add_limited(self: Any, req_idx: int, sampling_params: Any) -> None:
        add(self, req_idx, sampling_params)
        speculator = getattr(self.req_states, ATTRIBUTE, None)
        if speculator is not None:
            speculator.limit_request(req_idx, sampling_params)

    Sampler.__call__, RejectionSampler.__call__, Sampler.add_request = sample_observed, reject_observed, add_limited
    setattr(Sampler, MARK, True)


def _wrap_runner() -> None:
    """Show the speculator the runner when its model is loaded, and when its KV cache is allocated."""
    runner: Any = sys.modules[RUNNER].GPUModelRunner
    if getattr(runner, MARK, False):
        return
    load, initialize = runner.load_model, runner.initialize_kv_cache

    @wraps(load)
    def load_and_reserve(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        speculator = getattr(self.req_states, ATTRIBUTE, None)
        if speculator is not None:
            speculator.reserve(self)

    @wraps(initialize)
    def initialize_and_attach(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        speculator = getattr(self.req_states, ATTRIBUTE, None)
        if speculator is not None:
            speculator.attach(self)

    runner.load_model, runner.initialize_kv_cache = load_and_reserve, initialize_and_attach
    setattr(runner, MARK, True)


def _observe(req_states: Any, logits: Any, input_batch: Any) -> None:
    speculator = getattr(req_states, ATTRIBUTE, None)
    if speculator is not None:
        speculator.observe_logits(logits, input_batch)
