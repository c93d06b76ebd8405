"""The speculator that drafts inside vLLM's V2 model runner, in the place of vLLM's own n-gram speculator.

It adapts the runner's tensors to `DeviceDrafting`. An exception becomes filler tokens: vLLM verifies the same number of
draft tokens for every request, and filler is most likely rejected.
Source: vllm/v1/worker/gpu/model_runner.py and vllm/v1/worker/gpu/spec_decode of the releases in versions.V2_SUPPORTED.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any
from weakref import ReferenceType

import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from specplug import profile as profiles
from specplug.core import Proposer
from specplug.engines.vllm.configure import KEY, TIMING, profile_in, proposers_of
from specplug.engines.vllm.draft_counters import PUBLISH_SECONDS
from specplug.engines.vllm.fault_isolation import ADAPTER, Faults
from specplug.engines.vllm.request_options import request_options
from specplug.engines.vllm.v2.device_chains import DeviceTexts
from specplug.engines.vllm.v2.device_datastore import DeviceDatastore
from specplug.engines.vllm.v2.device_drafting import DeviceDrafting, LogitRows
from specplug.engines.vllm.v2.device_forms import device_form, running_the_target
from specplug.engines.vllm.v2.loaded_profile import LoadedProfile
from specplug.engines.vllm.v2.model_proposer import ModelProposer
from specplug.engines.vllm.v2.target_layers import TargetLayers
from specplug.engines.vllm.v2.target_model import TargetModel, refuse_target_settings
from specplug.engines.vllm.versions import require
from specplug.errors import UsageError
from specplug.profile import Profile

Tensor = Any

SMALLEST_WIDTH = 128
"""Tokens. Texts are looked up to a power of two, from this on, so that few shapes occur."""

WARM_UP = ("_warmup_", "_v2_")
"""How the ids of the requests begin with which vLLM warms its kernels up."""

logger = init_logger("vllm.specplug")


class DeviceSpeculator(BaseSpeculator):  # type: ignore[misc]
    """Drafts with the profile that `additional_config` names.

    With tensor parallelism the first rank drafts, and the others receive its draft tokens: all ranks have to verify the
    same ones. Where a proposer runs the target's layers, all ranks draft, since those communicate.
    """

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: Any, device: Any, req_states: Any) -> None:
        """EngineError for a vLLM that is not supported; UsageError for a profile or a setting that cannot be used."""
        require()
        refuse_settings(vllm_config)
        profile = profile_in(vllm_config.additional_config)
        spec = vllm_config.speculative_config
        self._states = req_states
        self._k: int = spec.num_speculative_tokens
        slots: int = vllm_config.scheduler_config.max_num_seqs
        self._length: int = vllm_config.model_config.max_model_len
        self._num_tokens: int = vllm_config.model_config.get_vocab_size()
        self._device = device
        self._timing: bool = vllm_config.additional_config[KEY].get(TIMING, False)
        self._group = _tensor_parallel_group()
        self.enable_adaptive_verification: bool = spec.enable_adaptive_verification
        self.draft_token_confidence_probs = torch.zeros((slots, self._k), dtype=torch.float32, device=device)
        self._tokens = torch.zeros((slots, self._k), dtype=torch.int64, device=device)
        self._is_first = self._group is None or self._group.rank_in_group == 0
        self._config = vllm_config
        self._runner: ReferenceType[Any] | None = None
        self._target: TargetModel | None = None
        self._started = False
        self._loaded = self._load(profile, proposers_of(profile))
        self._ref = ""
        self._others: dict[str, LoadedProfile] = {}
        self._starting: dict[int, Sequence[int]] = {}
        self._prompts: dict[int, int] = {}
        self._limits: dict[int, int] = {}
        self._warned_of_corpora = False
        self._rows: LogitRows | None = None
        self._publish_at = 0.0
        self._follow_requests()
        logger.info(
            "specplug: profile %s drafts with %s, %d tokens at most, on the V2 runner; %s",
            profile.name,
            " and ".join(one.method for one in profile.proposers),
            self._k,
            _planning(spec),
        )
        for one in self.drafting.proposers if self.drafting is not None else ():
            if isinstance(one, DeviceDatastore):
                logger.info("specplug: %s", one.summary)

    @property
    def drafting(self) -> DeviceDrafting | None:
        """None on ranks that receive their draft tokens."""
        return self._loaded.drafting

    @property
    def faults(self) -> Faults:
        return self._loaded.faults

    def use_profile(self, ref: str, *, fresh: bool) -> None:
        """Draft with the profile in the file `ref` from now on. Call it only while no request is running.

        A profile that was used before keeps what it learned, unless `fresh` is set.
        """
        self._others[self._ref] = self._loaded
        if fresh or ref not in self._others:
            profile = profiles.load(ref)
            self._others[ref] = self._load(profile, proposers_of(profile))
        self._ref, self._loaded = ref, self._others.pop(ref)

    def reserve(self, runner: Any) -> None:
        """The runner's model is loaded, and the size of its KV cache is not chosen yet.

        UsageError where a proposer cannot work with the model, or has not enough memory.
        """
        methods, drafting = running_the_target(self._loaded.sources), self.drafting
        if methods and drafting is not None:
            layers = TargetLayers(runner.model, methods[0])
            for one in drafting.proposers:
                if isinstance(one, ModelProposer):
                    one.reserve(layers, self._config)

    def attach(self, runner: Any) -> None:
        """The runner's model is loaded, and its KV cache allocated; again where it allocates another one.

        UsageError where a proposer cannot work with them.
        """
        self._runner, self._target = ReferenceType(runner), None
        self._attach(self._loaded)

    def _attach(self, loaded: LoadedProfile) -> None:
        """Give the target to the proposers that run its layers, once it is there."""
        runner = self._runner() if self._runner is not None else None
        methods = running_the_target(loaded.sources)
        if runner is None or not methods or loaded.drafting is None:
            return
        if self._target is None:
            self._target = TargetModel(runner, methods[0])
        for one in loaded.drafting.proposers:
            if isinstance(one, ModelProposer):
                one.attach(self._target)

    def _load(self, profile: Profile, sources: Sequence[Proposer]) -> LoadedProfile:
        faults = Faults(logger)
        methods = running_the_target(sources)
        if methods:
            refuse_target_settings(self._config, methods)
        if not self._is_first and not methods:
            return LoadedProfile(profile, sources, None, faults)
        drafting = DeviceDrafting(
            [device_form(one, self._num_tokens, self._device) for one in sources],
            [one.method for one in profile.proposers],
            k=self._k,
            slots=len(self._tokens),
            num_tokens=self._num_tokens,
            device=self._device,
            faults=faults,
            raises=bool(methods) and self._group is not None,
            learned=profile.measured.acceptance if profile.measured else None,
        )
        loaded = LoadedProfile(profile, sources, drafting, faults)
        self._attach(loaded)
        return loaded

    # -- what the runner calls -----------------------------------------------------------------------------------

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Drafting is not captured."""

    def capture(self) -> None:
        """Drafting is not captured."""

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: Any,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """int64[n, K] draft tokens, all of them valid ids."""
        n: int = input_batch.num_reqs
        tokens, confidence = self._tokens[:n], self.draft_token_confidence_probs[:n]
        if dummy_run:
            self._rehearse(input_batch)
            self._share(tokens, confidence)
            return tokens
        rows, self._rows = self._rows, None
        tokens.copy_(last_sampled[input_batch.idx_mapping].view(n, 1).expand(n, self._k))
        confidence.zero_()
        if self.drafting is not None and ADAPTER not in self.faults.disabled:
            try:
                self._start_requests()
                wanted = self._wanted(input_batch.idx_mapping_np[:n].tolist(), num_speculative_tokens)
                if self._target is not None:
                    self._target.follow(input_batch)
                texts = self._texts(input_batch, num_sampled > 0, wanted)
                drafted = self.drafting.step(texts, num_sampled, num_rejected, rows, drafts=wanted > 0)
                if drafted is not None:
                    tokens.copy_(self._wrong(tokens) if self._timing else drafted[0])
                    confidence.copy_(drafted[1])
                self._loaded.steps += 1
                if self._is_first and monotonic() >= self._publish_at:
                    self._publish_at = monotonic() + PUBLISH_SECONDS
                    self._loaded.publish()
            except Exception as error:
                self._record(error)
        self._share(tokens, confidence)
        return tokens

    def _share(self, tokens: Tensor, confidence: Tensor) -> None:
        """With several ranks, replace the tokens and probabilities of all others by those of the first."""
        if self._group is not None:
            # Ids below 2**53 are exact in float64.
            both = self._group.broadcast(torch.cat((tokens.double(), confidence.double()), 1), 0)
            tokens.copy_(both[:, : self._k].long())
            confidence.copy_(both[:, self._k :].float())

    def _rehearse(self, input_batch: Any) -> None:
        """Draft for empty slots: before the first request vLLM measures memory and the time of drafting in dummy
        runs."""
        if self.drafting is None or self._started:
            return
        n: int = input_batch.num_reqs
        nothing = torch.zeros(n, dtype=torch.int64, device=self._device)
        lengths = torch.zeros(len(self._tokens), dtype=torch.int32, device=self._device)
        slots = torch.arange(n, device=self._device)
        texts = DeviceTexts(slots, self._states.all_token_ids.gpu, lengths, self._length, nothing > 0)
        try:
            if self._target is not None:
                self._target.follow(input_batch, is_dummy=True)
            self.drafting.step(texts, nothing, nothing)
        except Exception as error:
            self._record(error)

    def _record(self, error: Exception) -> None:
        """Count a fault in a step; raise it where other ranks would wait for one that goes on without it."""
        if self.drafting is not None and self.drafting.raises:
            raise error
        self.faults.record(ADAPTER, "raised", f"{type(error).__name__}: {error}")

    def _wrong(self, last: Tensor) -> Tensor:
        """Draft tokens that are almost always rejected, which costs the same as accepting them."""
        return (last + 1) % self._num_tokens

    # -- what the hooks call -------------------------------------------------------------------------------------

    def observe_logits(self, logits: Tensor, input_batch: Any) -> None:
        """Keep the likeliest ids of a pass. The sampler calls this before it changes the logits."""
        if self.drafting is None or not self.drafting.reads_logits or ADAPTER in self.faults.disabled:
            return
        try:
            self._rows = LogitRows(
                input_batch.input_ids[input_batch.logits_indices].long(),
                logits.argmax(-1),
                input_batch.expanded_idx_mapping.long(),
                input_batch.expanded_local_pos.long(),
            )
        except Exception as error:
            self._rows = None
            self._record(error)

    def limit_request(self, slot: int, params: Any) -> None:
        """Read from its sampling parameters how long drafts a new request asks for."""
        try:
            options = request_options(getattr(params, "extra_args", None))
            self._limits[slot] = options.max_draft
            if options.sequence.corpora is not None and not self._warned_of_corpora:
                self._warned_of_corpora = True
                logger.warning(
                    "specplug: a request names corpora, but in this runner all requests draft from the same ones; "
                    "corpora_for: asking in the profile leaves the choice to requests"
                )
        except Exception as error:
            self.faults.record(ADAPTER, "raised", f"{type(error).__name__}: {error}")

    # -- requests ------------------------------------------------------------------------------------------------

    def _follow_requests(self) -> None:
        """Wrap the two methods by which requests take slots of this runner and leave them."""
        states = self._states
        add, remove = states.add_request, states.remove_request

        def add_request(
            req_id: str, prompt_len: int, all_token_ids: Any, num_computed_tokens: int, max_tokens: int
        ) -> None:
            add(req_id, prompt_len, all_token_ids, num_computed_tokens, max_tokens)
            if not self._started and not req_id.startswith(WARM_UP):
                self._started = True
                # Without what was learned from warming up.
                self._loaded = self._load(self._loaded.profile, self._loaded.sources)
            slot = states.req_id_to_index[req_id]
            self._starting[slot] = all_token_ids
            self._prompts[slot] = prompt_len
            self._limits.pop(slot, None)

        def remove_request(req_id: str) -> Any:
            slot = states.req_id_to_index.get(req_id)
            if slot is not None:
                self._end_request(slot)
            return remove(req_id)

        states.add_request, states.remove_request = add_request, remove_request

    def _start_requests(self) -> None:
        """Start the requests whose tokens have arrived on the device since the last step."""
        assert self.drafting is not None
        starting, self._starting = self._starting, {}
        most = self._loaded.profile.vllm.num_speculative_tokens
        for slot, known in starting.items():
            text = self._states.all_token_ids.gpu[slot]
            self.drafting.begin(slot, text, len(known), known=known, limit=min(most, self._limits.get(slot, most)))

    def _end_request(self, slot: int) -> None:
        started = self._starting.pop(slot, None) is None
        num_prompt = self._prompts.pop(slot, None)
        self._limits.pop(slot, None)
        if not started or num_prompt is None or self.drafting is None or ADAPTER in self.faults.disabled:
            return
        try:
            # The host's count of tokens includes draft tokens that may have been rejected since.
            width = self._width(int(self._states.num_computed_tokens_np[slot]) + self._k + 2)
            text = self._states.all_token_ids.gpu[slot, :width]
            self.drafting.end(text, num_prompt, self._states.total_len.gpu[slot], slot=slot)
        except Exception as error:
            self._record(error)

    def _wanted(self, slots: Sequence[int], scheduled: int | None) -> int:
        """The longest chain that any request of the batch can use; the same on all ranks.

        scheduled  draft tokens that the scheduler verifies; None where it verifies all of them
        """
        longest = max((self._limits.get(slot, self._k) for slot in slots), default=self._k)
        return min(self._k if scheduled is None else scheduled, longest)

    def _texts(self, input_batch: Any, running: Tensor, wanted: int) -> DeviceTexts:
        states, slots = self._states, input_batch.idx_mapping.long()
        longest = int(input_batch.seq_lens_cpu_upper_bound.numpy().max()) + 1
        width = self._width(longest)
        return DeviceTexts(slots, states.all_token_ids.gpu, states.total_len.gpu, width, running, wanted)

    def _width(self, tokens: int) -> int:
        return min(self._length, max(SMALLEST_WIDTH, 1 << (tokens - 1).bit_length()))


def refuse_settings(vllm_config: Any) -> None:
    """UsageError for a setting of vLLM beside which specplug cannot draft on the V2 runner."""
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        raise UsageError("specplug needs all logits on one rank; remove --enable-batch-sharded-sampling")
    if getattr(vllm_config, "watermark_config", None) is not None:
        raise UsageError(
            "vLLM's watermarks need a drafter that knows them; remove --watermark-config, or draft with none"
        )


def _planning(spec: Any) -> str:
    if spec.enable_adaptive_verification:
        return "vLLM's adaptive verification chooses the number to verify, by specplug's probabilities"
    if spec.num_speculative_tokens_per_batch_size:
        return "the number to verify follows the batch size"
    return "the number to verify is fixed"


def _tensor_parallel_group() -> Any:
    """The group of the ranks that share a model; None for a single one."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return group if group.world_size > 1 else None
