"""The class that drafts inside vLLM's runner: `method: custom_class`, `model: …SpecplugProposer`.

It adapts the rows, tokens and logits of vLLM's runner to `Drafting`. An exception during a step becomes empty drafts.
Source: vllm/v1/worker/gpu_model_runner.py, 0.22 to 0.33. vLLM passes tokens and lengths to a custom class, but neither
the requests that the rows belong to nor the logits. Therefore `GPUModelRunner._sample`, which runs just before, is
wrapped once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import count
from time import monotonic, perf_counter_ns
from typing import Any

import numpy.typing as npt
from vllm.logger import init_logger

from specplug import profile as profiles
from specplug.drafts.chains import as_chains
from specplug.engines.vllm.configure import profile_in, proposers_of
from specplug.engines.vllm.draft_counters import PUBLISH_SECONDS, PrometheusCounters
from specplug.engines.vllm.drafting import Drafting, Pass
from specplug.engines.vllm.fault_isolation import ADAPTER, Faults, GuardedProposer
from specplug.engines.vllm.patches import patch_expand_batch_to_tokens
from specplug.engines.vllm.request_table import RequestTable
from specplug.engines.vllm.top_ids import TopIdsOfPass
from specplug.engines.vllm.versions import check_interface, require
from specplug.errors import UsageError
from specplug.planning.batch_speculator import BatchSpeculator, batch_cost
from specplug.planning.cost import BatchCost
from specplug.profile import CostPoints, Profile
from specplug.proposers.datastore import datastore_of

TICK_NS = 45_000
"""Nanoseconds by which the clock of an engine with several ranks advances at every reading. Real clocks would differ
between ranks, but all ranks must draft alike."""

logger = init_logger("vllm.specplug")


@dataclass(slots=True)
class _LoadedProfile:
    """The state of drafting with one profile."""

    drafting: Drafting
    faults: Faults
    published: PrometheusCounters | None = None


class SpecplugProposer:
    """Drafts for vLLM's runner with the profile that `additional_config` names."""

    def __init__(self, vllm_config: Any) -> None:
        """EngineError for a vLLM that is not supported; UsageError for a profile that cannot be used."""
        require()
        check_interface()
        profile = profile_in(vllm_config.additional_config)
        self._config = vllm_config
        self._several_ranks = several_ranks = vllm_config.parallel_config.tensor_parallel_size > 1
        k: int = vllm_config.speculative_config.num_speculative_tokens
        self._loaded = self._load(profile, k)
        self._ref = ""
        self._others: dict[str, _LoadedProfile] = {}
        self._runner: Any = None
        self._num_drafts: Sequence[int] | None = None
        self._top_ids: TopIdsOfPass | None = None
        self._publish_at = 0.0
        self._publishes = not several_ranks or _is_first_rank()
        wrap_sampling()
        if vllm_config.device_config.device_type == "cpu" and patch_expand_batch_to_tokens():
            logger.info("specplug: patched a fault of this vLLM in sampling with drafts on CPUs, in memory only")
        logger.info(
            "specplug: profile %s drafts with %s, at most %d tokens, on the V1 runner%s",
            profile.name,
            " and ".join(spec.method for spec in profile.proposers),
            k,
            "; costs are not corrected while running, because all ranks must draft alike" if several_ranks else "",
        )

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM with the target; there is nothing to load."""

    def use_profile(self, ref: str, *, fresh: bool) -> None:
        """Draft with the profile in the file `ref` from now on. Call it only while no request is running.

        A profile that was used before keeps what it learned, unless `fresh` is set.
        """
        if self._publishes:
            self._publish()
        self._others[self._ref] = self._loaded
        if fresh or ref not in self._others:
            profile = profiles.load(ref)
            k = min(profile.vllm.num_speculative_tokens, self._config.speculative_config.num_speculative_tokens)
            self._others[ref] = self._load(profile, k)
        self._ref, self._loaded = ref, self._others.pop(ref)

    @property
    def drafting(self) -> Drafting:
        return self._loaded.drafting

    @property
    def faults(self) -> Faults:
        return self._loaded.faults

    def _load(self, profile: Profile, k: int) -> _LoadedProfile:
        faults = Faults(logger)
        clock = count(step=TICK_NS).__next__ if self._several_ranks else perf_counter_ns
        names = [spec.method for spec in profile.proposers]
        num_tokens = self._config.model_config.get_vocab_size()
        proposers = proposers_of(profile)
        datastore = datastore_of(proposers)
        guarded = [
            GuardedProposer(as_chains(proposer), name, faults, num_tokens=num_tokens)
            for name, proposer in zip(names, proposers, strict=True)
        ]
        cost = cost_of(profile)
        speculator = BatchSpeculator(
            guarded,
            names,
            cost,
            k=k,
            static=profile.planner.mode == "static",
            uniform=profile.vllm.uniform,
            learned=profile.measured.acceptance if profile.measured else None,
            clock=clock,
        )
        requests = RequestTable(
            self._config.model_config.max_model_len,
            offered=lambda: datastore.offered if datastore is not None else (),
            warn=lambda text: logger.warning("specplug: %s", text),
        )
        drafting = Drafting(
            speculator,
            cost,
            requests,
            adaptive=not self._several_ranks,
            clock=clock,
        )
        return _LoadedProfile(drafting, faults)

    def before_sampling(self, runner: Any, logits: Any, metadata: Any) -> None:
        """Keep the runner's state of this pass, and start to read top ids if the proposers require them."""
        self._runner = runner
        self._num_drafts = None if metadata is None else metadata.num_draft_tokens
        self._top_ids = None
        k = 0 if ADAPTER in self.faults.disabled else self.drafting.wants_topk
        if k and logits is not None:
            self._top_ids = TopIdsOfPass(logits, k, greedy=runner.input_batch.sampling_metadata.all_greedy)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: npt.NDArray[Any],
        token_ids_cpu: npt.NDArray[Any],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft tokens by row, at most `num_speculative_tokens` for each row."""
        n = len(sampled_token_ids)
        if ADAPTER in self.faults.disabled:
            return [[] for _ in range(n)]
        try:
            drafts = self.drafting.step(self._pass(sampled_token_ids, num_tokens_no_spec, token_ids_cpu))
            if monotonic() >= self._publish_at and self._publishes:
                self._publish()
        except Exception as error:
            self.faults.record(ADAPTER, "raised", f"{type(error).__name__}: {error}")
            drafts = [[] for _ in range(n)]
        return drafts

    def _pass(self, sampled: list[list[int]], num_tokens: npt.NDArray[Any], token_ids: npt.NDArray[Any]) -> Pass:
        runner = self._runner
        batch, requests = runner.input_batch, runner.requests

        def params(request_id: str) -> Any:
            return requests[request_id].sampling_params

        return Pass(
            batch.req_ids,
            sampled,
            self._num_drafts,
            num_tokens,
            batch.num_prompt_tokens,
            token_ids,
            int(runner.query_start_loc.np[len(sampled)]),
            requests,
            params,
            self._top_ids.rows if self._top_ids is not None else None,
        )

    def _publish(self) -> None:
        self._publish_at = monotonic() + PUBLISH_SECONDS
        if self._loaded.published is None:
            self._loaded.published = PrometheusCounters()
        values = self.drafting.counters.values()
        values["guard_trips"] = {labels: float(number) for labels, number in self.faults.counts.items()}
        values["proposers_off"] = {(name,): 1.0 for name in self.faults.disabled}
        self._loaded.published.update(values)


def cost_of(profile: Profile) -> BatchCost:
    """The profile's cost curves. UsageError when it has none, because no default would be right."""
    measured = profile.measured
    curves = measured.batch_curves if measured else ()
    if not curves and profile.planner.mode == "static":
        curves = (CostPoints((0,), (1,), ((1.0,),)),)  # static planning does not use costs
    if not curves:
        raise UsageError(
            f"profile {profile.name} has no measured costs for vLLM; run specplug serve or specplug tune with it"
        )
    return batch_cost(curves)


def wrap_sampling() -> None:
    """Call `SpecplugProposer.before_sampling` before every pass is sampled. Wrapping again changes nothing.

    A pass without any draft token is then sampled as in plain decoding. vLLM's rejection sampler would cost more, and
    with `top_k` alone it fails on such a pass (0.32.0: the maximum of no rows in `apply_top_k_only`).
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner: Any = GPUModelRunner
    sample = runner._sample
    if getattr(sample, "wrapped_by_specplug", False):
        return

    @wraps(sample)
    def wrapped(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        drafter = getattr(self, "drafter", None)
        if isinstance(drafter, SpecplugProposer):
            try:
                drafter.before_sampling(self, logits, spec_decode_metadata)
            except Exception as error:
                drafter.faults.record(ADAPTER, "raised", f"{type(error).__name__}: {error}")
            if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
                spec_decode_metadata = None
        return sample(self, logits, spec_decode_metadata)

    wrapped.wrapped_by_specplug = True  # type: ignore[attr-defined]
    runner._sample = wrapped


def _is_first_rank() -> bool:
    """Whether this rank publishes metrics: all ranks draft alike, so one of them is enough."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)
