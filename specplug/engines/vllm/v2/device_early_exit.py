"""Early exit on the device: the target's first layers, its norm and its head draft a chain, token by token.

The K/V that a pass computes go to the target's own cache, at positions of tokens that are not verified yet: the next
verification overwrites them before anything else reads them. So nothing is copied, no text is read twice, and every
exit can draft in every step.
Source: LayerSkip (arXiv 2404.16710) and DEL (arXiv 2504.05598), with the choice of `planning.exit_choice`.
State: the latest chain of each slot, and four numbers per exit. Cost per draft token: the first layers and the head
over one row per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from specplug.drafts.confidence import EDGES, buckets_of, exit_buckets
from specplug.engines.vllm.v2.device_chains import NONE, DeviceChains, DeviceStep, DeviceTexts
from specplug.engines.vllm.v2.device_counters import DelayedCounters
from specplug.engines.vllm.v2.model_proposer import ModelProposer
from specplug.errors import UsageError
from specplug.planning.exit_choice import ExitChoice, best_length
from specplug.proposers.early_exit import EarlyExit

if TYPE_CHECKING:  # it imports vllm
    from specplug.engines.vllm.v2.target_model import TargetModel

Tensor = Any

DELAY = 2
"""Steps. vLLM schedules a step after it has received the tokens of the one two steps before, so waiting for what the
device counted then takes no time."""

MOST_TESTED = 8
"""Draft tokens. More of them in one step count as this many, so that a large batch does not make the choice certain for
thousands of steps. Chosen."""


class DeviceEarlyExit(ModelProposer):
    """The exit of a step follows from what was right and wrong up to DELAY steps before, on all ranks alike."""

    def __init__(self, proposer: EarlyExit, num_tokens: int, device: Any) -> None:
        """
        proposer    with `exits`
        num_tokens  size of the vocabulary
        """
        assert proposer.exits is not None
        self.exits = (proposer.exit,) if isinstance(proposer.exit, int) else proposer.exits
        """Layers of each exit."""
        own = buckets_of(1)
        self.buckets = exit_buckets(self.exits, own)
        self.choice = ExitChoice(len(self.exits))
        self.draft_costs: tuple[float, ...] = ()
        """Of a draft token by exit, in passes of the target; see `attach`."""
        self._is_fixed = isinstance(proposer.exit, int)
        self._longest = proposer.max_draft
        self._most = self._longest
        """Draft tokens of a chain in this step, at most."""
        self._num_own = len(own)
        self._last_id = num_tokens - 1
        self._device = device
        self._edges = torch.tensor(EDGES, dtype=torch.float32, device=device)
        self._target: TargetModel | None = None
        self._counts = torch.zeros((len(self.exits), 2), dtype=torch.int64, device=device)
        """Right and wrong draft tokens of each exit, that followed text that was right."""
        self._known = [[0, 0] for _ in self.exits]
        self._delayed = DelayedCounters(DELAY)
        self._chains = torch.zeros((0, 0), dtype=torch.int64, device=device)
        self._exit_of = torch.zeros(0, dtype=torch.int64, device=device)
        """The exit that drafted the chain of each slot; the place after the last one stands for no chain."""

    @property
    def current(self) -> int | None:
        """Layers of the exit that drafts; None where drafts are expected to cost more than they save."""
        return None if self.choice.current is None else self.exits[self.choice.current]

    def attach(self, target: TargetModel) -> None:
        """A draft token costs the bytes of the weights that it reads: those of its layers and of the head, over those
        of all layers and the head. It is a model, not a measurement: launches and the reading of K/V are left out.
        """
        total = len(target.layers)
        beyond = [layers for layers in self.exits if layers >= total]
        if beyond:
            raise UsageError(
                f"early_exit: exits after {' and '.join(map(str, beyond))} layers, but this model has {total}; choose "
                f"numbers below {total}"
            )
        body, head = target.layers.weight_bytes(total)
        costs = [(sum(target.layers.weight_bytes(layers)), body + head) for layers in self.exits]
        self.draft_costs = tuple(own / whole for own, whole in costs)
        self._target = target
        self._chains = torch.full((target.num_slots, 1), NONE, dtype=torch.int64, device=self._device)
        self._exit_of = self._no_exit(target.num_slots)

    def begin_request(self, slot: int, known: Sequence[int]) -> None:
        """A chain of the request that had the slot before is forgotten."""
        self._exit_of[slot : slot + 1].fill_(len(self.exits))

    def observe(self, step: DeviceStep) -> None:
        """Count the chains, also those in whose place another proposer's were verified, and choose the next exit."""
        if self._target is None or step.slots is None:
            return
        most = min(self._chains.shape[1], step.after.shape[1])
        chains, exits = self._chains[step.slots, :most], self._exit_of[step.slots]
        tested = step.emitted[:, :most] & (chains != NONE) & (exits < len(self.exits))[:, None]
        right = (tested & (chains == step.after[:, :most])).cumprod(1) > 0
        tested[:, 1:] &= right[:, :-1]
        of_exits = torch.stack((right.sum(1), (tested & ~right).sum(1)), 1)
        self._counts.index_add_(0, exits.clamp(max=len(self.exits) - 1), of_exits)
        self._exit_of[step.slots] = self._no_exit(len(step.slots))
        if not self._is_fixed:
            self._choose(self._delayed.poll(self._counts))

    def propose(self, texts: DeviceTexts, k: int) -> DeviceChains:
        n = len(texts.slots)
        tokens = torch.full((n, k), NONE, dtype=torch.int64, device=self._device)
        self._most = min(k, self._longest, k if texts.wanted is None else texts.wanted)
        number, length = self.choice.current, self._length()
        # Without a request whose prompt was read, nothing was emitted. A dummy batch has no slots.
        reading = self._target is not None and bool(self._target.slots_on_host) and not self._target.slots_read
        if self._target is None or number is None or not length or reading:
            return DeviceChains(tokens, torch.zeros_like(tokens))
        target, going = self._target, texts.running
        if going is None:
            going = torch.ones(n, dtype=torch.bool, device=self._device)
        token, position = texts.last().clamp(0, self._last_id), texts.row_lengths() - 1
        drafted, drafts, likelihood = [], [], []
        for depth in range(length):
            going = going & target.has_room(position)
            with target.one_token_pass(position, going, depth + 1) as places:
                logits = target.layers.logits(target.layers.hidden(token, places, self.exits[number])).float()
            highest, token = logits.max(-1)
            drafted.append(token)
            drafts.append(going)
            likelihood.append(highest - logits.logsumexp(-1))
            position = position + 1
        tokens[:, :length] = torch.stack(drafted, 1).masked_fill(~torch.stack(drafts, 1), NONE)
        buckets = torch.zeros_like(tokens)
        bands = torch.bucketize(torch.stack(likelihood, 1).exp(), self._edges, right=True)
        buckets[:, :length] = bands + number * self._num_own
        if self._chains.shape[1] < k:
            self._chains = torch.full((target.num_slots, k), NONE, dtype=torch.int64, device=self._device)
        self._chains[texts.slots] = tokens
        self._exit_of[texts.slots] = self._no_exit(n) - len(self.exits) + number
        return DeviceChains(tokens, buckets)

    # -- the choice ----------------------------------------------------------------------------------------------

    def _choose(self, counts: list[list[int]] | None) -> None:
        if counts is None:
            return
        for exit_, ((right, wrong), (before, failed)) in enumerate(zip(counts, self._known, strict=True)):
            tested = right - before + wrong - failed
            if tested:
                counted = min(tested, MOST_TESTED)
                hits = round(counted * (right - before) / tested)
                # The choice by cost does not look at probabilities.
                self.choice.learn(exit_, [1.0] * hits, [1.0] * (counted - hits))
        self._known = counts
        self.choice.fade()
        self.choice.choose(self._saved, self.draft_costs, [0.0] * len(self.exits))

    def _saved(self, rate: float, cost: float) -> float:
        return best_length(rate, cost, self._most)[0]

    def _length(self) -> int:
        """Draft tokens of a chain."""
        number = self.choice.current
        if self._is_fixed or number is None or not self.draft_costs:
            return self._most
        return best_length(self.choice.rate(number), self.draft_costs[number], self._most)[1]

    def _no_exit(self, count: int) -> Tensor:
        return torch.full((count,), len(self.exits), dtype=torch.int64, device=self._device)
