"""Replays a setting as it runs live on an engine whose batch changes at every step: chains, planned for the batch.

This module depends on traces, costs and `BatchSpeculator`. It does not depend on an engine and runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from specplug import registry
from specplug.core import IntArray, int_array
from specplug.drafts.chains import ChainProposer, ChainSteps, as_chains
from specplug.planning.batch_size_schedule import MOST_SEQUENCES, Range, length_at
from specplug.planning.batch_speculator import BatchSpeculator, batch_cost
from specplug.proposers.datastore import wait_for_corpora
from specplug.registry import ProposerSpec
from specplug.tune.candidates import BUILTIN, BUILTIN_ON_DEVICE, Setting
from specplug.tune.expense import Clock, PricedChains, SimulatedClock
from specplug.tune.prediction import POSITIONS, Costs, Sums
from specplug.tune.trace import Answer

Wrap = Callable[[ChainProposer, str], ChainProposer]


@dataclass(slots=True)
class _Cursor:
    """The state of one answer.

    at      index of its last verified token
    before  the same before the latest pass
    known   number of tokens that the proposers have observed
    """

    seq: int
    answer: Answer
    tokens: list[int]
    at: int = 0
    before: int = 0
    known: int = 0
    sums: Sums = field(default_factory=Sums)


class BatchReplay:
    """The replay of one setting. What it learns from one answer, it keeps for the next."""

    def __init__(
        self,
        setting: Setting,
        costs: Costs,
        *,
        max_tokens: int,
        learned: Mapping[str, Sequence[float]] | None = None,
        clock: Clock | None = None,
        wrap: Wrap | None = None,
    ) -> None:
        """clock    a SimulatedClock by default
        wrap     wraps the chains of a method; by default in their measured cost
        learned  acceptance counts that the buckets start with
        """
        specs = [replayed_as(spec) for spec in setting.proposers]
        self._clock = clock = clock or SimulatedClock()
        self._expense = expense = costs.expense
        self._wrap = wrap or (lambda chains, method: PricedChains(chains, clock, expense, method, len(specs)))
        self._cost = batch_cost(costs.batch)
        self._lengths: tuple[Range, ...] = setting.lengths
        if any(spec.options == BUILTIN_ON_DEVICE for spec in setting.proposers):
            self._lengths = ((1, MOST_SEQUENCES, setting.planner.max_nodes),)
        sources = registry.build_sources(specs)
        wait_for_corpora(sources)
        self.speculator = BatchSpeculator(
            [
                self._wrap(as_chains(source), spec.method)
                for source, spec in zip(sources, setting.proposers, strict=True)
            ],
            [spec.method for spec in specs],
            self._cost,
            k=setting.planner.max_nodes,
            static=bool(self._lengths) or setting.planner.mode == "static",
            uniform=costs.uniform,
            learned=learned,
            clock=clock,
        )
        self._speculates = setting.speculates
        self._seqs = count()
        self._ended: list[_Cursor] = []
        self._max_tokens = max_tokens
        self.drafted: list[tuple[int, int]] = []
        """(sequences, nanoseconds) of every draft for the batch."""

    def run(self, group: Sequence[Answer]) -> list[Sums]:
        """Replay a group of answers that run at once.

        The time of an answer is that of its own request, divided by the size of the group. The time in which it only
        waits for longer answers is not counted.
        """
        cursors = [_Cursor(next(self._seqs), answer, answer.tokens.tolist()) for answer in group]
        running = [c for c in cursors if len(c.tokens) > 1]
        while running:
            ms = self._step(running) / len(group)
            for c in running:
                c.sums.ms += ms
            self._ended += [c for c in running if c.known and c.at + 1 == len(c.tokens)]
            running = [c for c in running if c.at + 1 < len(c.tokens)]
        for at in range(1, max(len(c.tokens) for c in cursors)):
            left = [c for c in cursors if at < len(c.tokens)]
            fill = sum(len(c.answer.prompt) + at - 1 for c in left) // len(left)
            line = self._cost.at(len(left), fill)
            ms = float(line[min(len(left), len(line)) - 1]) + self._expense.step.ns(len(left)) / 1e6
            for c in left:
                c.sums.plain_ms += ms / len(group)
        for c in cursors:
            c.sums.tokens = len(c.tokens) - 1
        return [c.sums for c in cursors]

    def _step(self, running: Sequence[_Cursor]) -> float:
        """Draft for all sequences and make one pass; returns the milliseconds of both."""
        began = self._clock()
        fill = sum(len(c.answer.prompt) + c.at for c in running) // len(running)
        drafts = self._draft(running, fill) if self._speculates else [[] for _ in running]
        spent_ns = self._clock() - began
        rows = len(running) + sum(map(len, drafts))
        if self._lengths:  # where a sequence has no draft, filler is verified
            rows = len(running) * (1 + length_at(self._lengths, len(running)))
        line = self._cost.at(len(running), fill)
        for c, draft in zip(running, drafts, strict=True):
            _verify(c, draft)
        return float(line[min(rows, len(line)) - 1]) + (spent_ns + self._expense.step.ns(rows)) / 1e6

    def _draft(self, running: Sequence[_Cursor], fill: int) -> list[list[int]]:
        speculator = self.speculator
        if not speculator.should_draft():
            return [[] for _ in running]
        began = self._clock()
        old = [c for c in (*running, *self._ended) if c.known <= c.at and c.known]
        for c in running:
            if not c.known:
                speculator.begin(c.seq, np.append(c.answer.prompt, c.answer.tokens[: c.at + 1]))
        if old:
            self._observe(old)
        for c in self._ended:  # after their last tokens were observed, as in a live engine
            speculator.end(c.seq)
        self._ended = []
        for c in running:
            c.known = c.at + 1
        budgets = int_array([max(0, self._max_tokens - c.at - 2) for c in running])
        plan = speculator.plan([c.seq for c in running], len(running), fill, budgets)
        self.drafted.append((len(running), self._clock() - began))
        most = length_at(self._lengths, len(running)) if self._lengths else speculator.k
        chains = plan.chains.tokens.tolist()
        return [chain[: min(most, length)] for chain, length in zip(chains, plan.lengths.tolist(), strict=True)]

    def _observe(self, old: Sequence[_Cursor]) -> None:
        """Pass on the tokens that were emitted since the last call, and the top ids of the latest pass."""
        emitted = [c.tokens[c.known : c.at + 1] for c in old]
        before = [token for c in old for token in c.tokens[c.known - 1 : c.at]]
        after = [token for tokens in emitted for token in tokens]
        read: IntArray = int_array([])
        topk, topk_ns = None, 0
        if self.speculator.wants_topk:
            read = np.concatenate([c.answer.tokens[c.before : c.at] for c in old])
            rows = np.concatenate([c.answer.topk[c.before : c.at] for c in old])
            topk = rows[:, : self.speculator.wants_topk]
            topk_ns = self._expense.topk.ns(len(rows))
            self._clock.advance(topk_ns)
        steps = ChainSteps([c.seq for c in old], emitted, int_array(before), int_array(after), read, topk)
        self.speculator.observe(steps, topk_ns)


def replayed_as(spec: ProposerSpec) -> ProposerSpec:
    """The method itself; for the engine's own drafter, the method of ours that proposes the most similar drafts."""
    if spec.options not in (BUILTIN, BUILTIN_ON_DEVICE):
        return spec
    return ProposerSpec("ngram", {"min_match": BUILTIN["prompt_lookup_min"], "max_match": BUILTIN["prompt_lookup_max"]})


def _verify(c: _Cursor, draft: Sequence[int]) -> None:
    """Accept the part of the draft that matches the answer, and move the cursor."""
    accepted = 0
    for drafted, token in zip(draft, c.tokens[c.at + 1 :], strict=False):
        if drafted != token:
            break
        accepted += 1
    c.before, c.at = c.at, min(c.at + accepted + 1, len(c.tokens) - 1)
    sums = c.sums
    sums.steps += 1
    sums.drafted += len(draft)
    sums.accepted += accepted
    for place in range(min(POSITIONS, len(draft))):
        sums.offered_at[place] += 1
        sums.accepted_at[place] += place < accepted
