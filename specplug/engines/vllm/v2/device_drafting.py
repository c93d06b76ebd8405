"""Drafts for a batch on the device: the best chain of several proposers, one step after the other.

Nothing here waits for the device: shapes follow from the number of requests, and what the host has to know (counters)
is copied to it while later steps run. It imports no vllm, so that it is tested and timed without an engine.
State: for each slot the latest chain, and what the proposers keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, TypeVar

import torch

from specplug.engines.vllm.fault_isolation import STALL_NS, Faults
from specplug.engines.vllm.v2.device_acceptance import DeviceAcceptance
from specplug.engines.vllm.v2.device_chains import NONE, DeviceChains, DeviceProposer, DeviceStep, DeviceTexts
from specplug.engines.vllm.v2.device_datastore import DeviceDatastore
from specplug.engines.vllm.v2.device_suffix import DeviceSuffix
from specplug.engines.vllm.v2.model_proposer import ModelProposer
from specplug.engines.vllm.v2.successors import Successors
from specplug.planning.fused_buckets import fused_buckets

Tensor = Any

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class LogitRows:
    """The rows of logits of a pass.

    tokens   int64[r]  the token that each row was computed from
    top      int64[r]  the likeliest id
    slots    int64[r]  the slot of the request
    depth    int64[r]  the row's number within its request, from 0
    """

    tokens: Tensor
    top: Tensor
    slots: Tensor
    depth: Tensor


class DeviceDrafting:
    """Call `step` once after every pass, in the order of the passes."""

    def __init__(
        self,
        proposers: Sequence[DeviceProposer],
        names: Sequence[str],
        *,
        k: int,
        slots: int,
        num_tokens: int,
        device: Any,
        faults: Faults,
        raises: bool = False,
        learned: Mapping[str, Sequence[float]] | None = None,
        clock: Callable[[], int] = perf_counter_ns,
    ) -> None:
        """
        k           longest chain
        slots       requests that can run at once
        num_tokens  size of the vocabulary
        faults      records faults of proposers, and turns those off that have too many
        raises      faults of proposers that run the target's layers are raised, since other ranks would wait for one
                    that goes on without it
        learned     maps bucket names to the (hits, misses) to start from
        clock       nanoseconds
        """
        self.proposers = tuple(proposers)
        self.names = tuple(names)
        self.k = k
        # A proposer of a third party may read them; lookups in texts do not.
        self.reads_logits = not all(
            isinstance(one, DeviceSuffix | DeviceDatastore | ModelProposer) for one in self.proposers
        )
        """Whether `step` is to be given the rows of logits."""
        self._faults = faults
        self.raises = raises
        self._clock = clock
        table = fused_buckets([one.buckets for one in self.proposers], names)
        self._firsts = table.firsts
        self.acceptance = DeviceAcceptance(table.buckets, device, learned)
        # Draft tokens that several proposers agree on belong to the place after the last proposer.
        owners = torch.full((len(table.buckets) + 1,), len(self.proposers), dtype=torch.int64)
        for index, own in enumerate(table.own):
            owners[sorted(own)] = index
        self._owner_of = owners.to(device)
        # Token recycling beside other proposers continues their chains.
        self._recycling = next(
            (n for n, one in enumerate(self.proposers) if isinstance(one, Successors) and len(self.proposers) > 1), None
        )
        self._num_tokens = num_tokens
        self._tokens = torch.zeros((slots, k), dtype=torch.int64, device=device)
        self._buckets = torch.full((slots, k), self.acceptance.nothing, dtype=torch.int64, device=device)
        self._path = torch.zeros((slots, k), dtype=torch.float32, device=device)
        self._limits = torch.full((slots,), k, dtype=torch.int64, device=device)
        self.drafted = torch.zeros(len(self.proposers) + 1, dtype=torch.int64, device=device)
        """int64[proposers + 1]: verified draft tokens of each proposer; the last place counts those of several."""
        self.accepted = torch.zeros_like(self.drafted)
        self.predicted = torch.zeros((), dtype=torch.float64, device=device)
        """Draft tokens that were expected to be accepted, of those that were verified."""
        self.invalid = torch.zeros(len(self.proposers), dtype=torch.int64, device=device)
        """int64[proposers]: chains with an id outside the vocabulary, or with an unknown bucket."""
        self._depth = torch.arange(k, device=device)
        self._nothing = torch.full((slots, k), NONE, dtype=torch.int64, device=device)

    def begin(
        self, slot: int, text: Tensor, num_tokens: int, *, limit: int | None = None, known: Sequence[int] = ()
    ) -> None:
        """A request takes a slot.

        text        int32[L], of which the first `num_tokens` are its prompt
        num_tokens  known to the host
        limit       the longest draft that the request asks for
        known       the prompt on the host, for proposers that run the target's layers
        """
        self._buckets[slot].fill_(self.acceptance.nothing)
        self._limits[slot].fill_(self.k if limit is None else min(limit, self.k))
        for index, proposer in enumerate(self.proposers):
            if isinstance(proposer, ModelProposer):
                self._guarded(index, proposer.begin_request, slot, known)
            else:
                self._guarded(index, proposer.begin, text, num_tokens)

    def end(self, text: Tensor, num_prompt: int, length: Tensor, *, slot: int | None = None) -> None:
        """A request leaves its slot; see `DeviceProposer.end`."""
        for index, proposer in enumerate(self.proposers):
            if isinstance(proposer, ModelProposer):
                if slot is not None:
                    self._guarded(index, proposer.end_request, slot)
            else:
                self._guarded(index, proposer.end, text, num_prompt, length)

    def step(
        self,
        texts: DeviceTexts,
        num_sampled: Tensor,
        num_rejected: Tensor,
        rows: LogitRows | None = None,
        *,
        drafts: bool = True,
    ) -> tuple[Tensor, Tensor] | None:
        """int64[n, k] draft tokens, all valid ids, and float32[n, k], P(accepted | those before were) of each.

        num_sampled   int[n]  tokens that the pass emitted for each request; 0 while its prompt is being read
        num_rejected  int[n]  draft tokens that the pass rejected
        drafts        False only learns, and returns None
        """
        num_sampled = num_sampled.long()
        lengths = texts.row_lengths()
        self._observe(texts, lengths, num_sampled, num_rejected.long(), rows)
        if drafts:
            return self._draft(texts, num_sampled)
        # An assigned number would be copied to the device first, and waited for.
        self._buckets.index_fill_(0, texts.slots, self.acceptance.nothing)
        return None

    # -- learning ------------------------------------------------------------------------------------------------

    def _observe(
        self, texts: DeviceTexts, lengths: Tensor, num_sampled: Tensor, num_rejected: Tensor, rows: LogitRows | None
    ) -> None:
        slots, depth = texts.slots, torch.arange(self.k + 1, device=texts.slots.device)
        exists = depth < num_sampled[:, None]
        places = (lengths - num_sampled)[:, None] + depth
        line = texts.tokens[:, : texts.width]
        after = line[slots[:, None], places.clamp(0, texts.width - 1)].long()
        before = line[slots[:, None], (places - 1).clamp(0, texts.width - 1)].long()
        buckets, path = self._buckets.index_select(0, slots), self._path.index_select(0, slots)
        agreeing = self.acceptance.learn(
            self._tokens.index_select(0, slots), buckets, after[:, : self.k], exists[:, : self.k]
        )
        verified = (self._depth < (num_sampled - 1 + num_rejected)[:, None]) & (num_sampled > 0)[:, None]
        verified &= buckets != self.acceptance.nothing
        owners = self._owner_of[buckets].flatten()
        self.drafted.scatter_add_(0, owners, verified.flatten().long())
        self.accepted.scatter_add_(0, owners, (verified & agreeing).flatten().long())
        self.predicted += (path * verified).sum()
        emitted = exists & self._known(before) & self._known(after)
        step = DeviceStep(before * emitted, after * emitted, emitted, slots=slots)
        if rows is not None:
            emitted_of = torch.zeros(len(self._limits), dtype=torch.int64, device=slots.device)
            emitted_of[slots] = num_sampled.clamp(min=1)
            kept = (rows.depth < emitted_of[rows.slots]) & self._known(rows.tokens) & self._known(rows.top)
            step = DeviceStep(step.before, step.after, emitted, rows.tokens * kept, rows.top * kept, kept, slots)
        for index, proposer in enumerate(self.proposers):
            self._guarded(index, proposer.observe, step)

    def _known(self, ids: Tensor) -> Tensor:
        """Whether ids are in the vocabulary."""
        return ids.clamp(0, self._num_tokens - 1) == ids

    # -- drafting ------------------------------------------------------------------------------------------------

    def _draft(self, texts: DeviceTexts, num_sampled: Tensor) -> tuple[Tensor, Tensor]:
        slots = texts.slots
        last = texts.last()
        last = last * self._known(last)
        best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        for index, proposer in enumerate(self.proposers):
            chain = self._guarded(index, self._chain, index, proposer, texts, last)
            if chain is None:
                continue
            tokens, buckets = chain
            confidence = self.acceptance.probability[buckets]
            expected = confidence.cumprod(1).sum(1)
            if best is None:
                best = tokens, buckets, confidence, expected
                continue
            better = expected > best[3]
            chosen = zip((tokens, buckets, confidence), best, strict=False)
            tokens, buckets, confidence = (torch.where(better[:, None], new, old) for new, old in chosen)
            best = tokens, buckets, confidence, torch.where(better, expected, best[3])
        if best is None:  # all proposers are off
            return last[:, None].repeat(1, self.k), torch.zeros_like(self._path.index_select(0, slots))
        asked = (self._depth < self._limits.index_select(0, slots)[:, None]) & (num_sampled > 0)[:, None]
        buckets = best[1].masked_fill(~asked, self.acceptance.nothing)
        tokens = torch.where(buckets == self.acceptance.nothing, last[:, None], best[0])
        confidence = best[2] * asked
        self._tokens[slots] = tokens
        self._buckets[slots] = buckets
        self._path[slots] = confidence.cumprod(1)
        return tokens, confidence

    def _chain(self, index: int, proposer: DeviceProposer, texts: DeviceTexts, last: Tensor) -> tuple[Tensor, Tensor]:
        """int64[n, k] tokens and buckets of the fusion. Token recycling continues a chain that ends.

        Where it has the same token as the chain, the bucket is that of agreement.
        """
        if index == self._recycling:
            chain = DeviceChains(self._nothing[: len(last)], self._nothing[: len(last)])
        else:
            chain = self._checked(index, proposer.propose(texts, self.k), len(last))
        if self._recycling is None:
            return chain.tokens, chain.buckets
        source = self.proposers[self._recycling]
        assert isinstance(source, Successors)
        tokens, kinds, agreed = source.completed(chain.tokens, last)
        recycled = (kinds + self._firsts[self._recycling]).masked_fill(
            tokens == source.unknown, self.acceptance.nothing
        )
        drafted = chain.buckets + agreed * len(proposer.buckets)
        return tokens, torch.where(chain.tokens == NONE, recycled, drafted)

    def _checked(self, index: int, chain: DeviceChains, n: int) -> DeviceChains:
        """The chain with buckets of the fusion; one with an invalid id or bucket ends before it, and is counted.

        Texts can hold ids outside the vocabulary, which stand for images.
        """
        proposer = self.proposers[index]
        count = max(1, len(proposer.buckets))
        for tensor in (chain.tokens, chain.buckets):
            if tuple(tensor.shape) != (n, self.k) or tensor.dtype != torch.int64 or tensor.device != self._depth.device:
                wanted = f"torch.int64[{n}, {self.k}] on {self._depth.device}"
                raise ValueError(f"a chain is {tensor.dtype}{list(tensor.shape)} on {tensor.device}, not {wanted}")
        invalid = chain.tokens.clamp(NONE, self._num_tokens - 1) != chain.tokens
        invalid |= chain.buckets.clamp(0, count - 1) != chain.buckets
        self.invalid[index] += invalid.any(1).sum()
        ended = ((chain.tokens == NONE) | invalid).cumsum(1) > 0
        buckets = (chain.buckets + self._firsts[index]).masked_fill(ended, self.acceptance.nothing)
        return DeviceChains(chain.tokens.masked_fill(ended, NONE), buckets)

    def _guarded(self, index: int, call: Callable[..., Result], *args: Any) -> Result | None:
        """The result of a call of a proposer; None if it fails, or if the proposer is off. Faults are recorded."""
        name = self.names[index]
        if name in self._faults.disabled:
            return None
        raises = self.raises and isinstance(self.proposers[index], ModelProposer)
        began = self._clock()
        try:
            result = call(*args)
        except ValueError as error:
            if raises:
                raise
            self._faults.record(name, "drafted nonsense", str(error))
            return None
        except Exception as error:
            if raises:
                raise
            self._faults.record(name, "raised", f"{type(error).__name__}: {error}")
            return None
        taken = self._clock() - began
        # The time to start operations depends on what the device is doing; specplug's own take none of their own.
        own = isinstance(self.proposers[index], DeviceSuffix | DeviceDatastore | Successors | ModelProposer)
        if taken > STALL_NS and not own:
            self._faults.record(name, "stalled", f"{taken / 1e6:.0f} ms")
            return None
        return result
