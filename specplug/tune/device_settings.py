"""Which settings are tried where proposers draft in vLLM's V2 runner: there vLLM plans, step by step or by batch size.

This module depends on names of methods and on predictions, not on an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from specplug.planning.batch_size_schedule import MOST_SEQUENCES, Range, lengths_of, ranges_of
from specplug.profile import CostPoints, PlannerSettings
from specplug.registry import ProposerSpec
from specplug.tune.candidates import BUILTIN_METHOD, BUILTIN_ON_DEVICE, CHAINS, Setting, alone_and_in_pairs
from specplug.tune.prediction import Prediction

EnginePlanning = Literal["adaptive", "batch_size"]
"""How vLLM chooses the draft tokens to verify: by its adaptive verification, or by a table of batch sizes."""


def device_grid(methods: Sequence[ProposerSpec], planning: EnginePlanning, most: int) -> list[Setting]:
    """Every setting to replay, most promising first, without plain decoding.

    methods  tried alone and in pairs
    most     tokens of the longest chain
    With planning by batch size, each number of draft tokens is one setting; `by_batch_size` combines them.
    """
    combined = alone_and_in_pairs(methods)[::-1]  # pairs first
    if planning == "adaptive":
        own = [Setting(specs, PlannerSettings(max_nodes=most, trees=False)) for specs in combined]
    else:
        own = [with_lengths(specs, [(1, MOST_SEQUENCES, n)]) for n in range(1, most + 1) for specs in combined]
    first = len(combined)
    return own[:first] + builtin_settings(most) + own[first:]


def builtin_settings(most: int) -> list[Setting]:
    """vLLM's own n-gram lookup with chains of fixed length."""
    specs = (ProposerSpec(BUILTIN_METHOD, BUILTIN_ON_DEVICE),)
    lengths = [n for n in CHAINS if n <= most]
    return [Setting(specs, PlannerSettings(mode="static", max_nodes=n, trees=False)) for n in lengths]


def by_batch_size(predicted: Mapping[Setting, Prediction], curves: Iterable[CostPoints]) -> list[Setting]:
    """For each combination of methods, the setting with the best number of draft tokens at every batch size.

    predicted  replays of settings of `device_grid`
    curves     of steps with 0, 1, 2 ... draft tokens per sequence, by number of sequences
    A combination of which no number of draft tokens pays anywhere is left out.
    """
    specs_of: dict[str, tuple[ProposerSpec, ...]] = {}
    tokens: dict[str, dict[int, float]] = {}
    for setting, prediction in predicted.items():
        if setting.lengths:
            specs_of[setting.method] = setting.proposers
            tokens.setdefault(setting.method, {})[setting.planner.max_nodes] = prediction.total.mean_acceptance_length
    curves = list(curves)
    found = []
    for method, by_length in tokens.items():
        known = [1.0]
        while len(known) in by_length:  # replays may have ended early, for lack of time
            known.append(by_length[len(known)])
        ranges = ranges_of(lengths_of(curves, known), MOST_SEQUENCES)
        if any(length for _, _, length in ranges):
            found.append(with_lengths(specs_of[method], ranges))
    return found


def with_lengths(methods: Sequence[ProposerSpec], ranges: Iterable[Sequence[int]]) -> Setting:
    """The setting of these methods with so many draft tokens by batch size."""
    lengths: tuple[Range, ...] = tuple((first, last, length) for first, last, length in ranges)
    planner = PlannerSettings(max_nodes=max(length for _, _, length in lengths), trees=False)
    return Setting(tuple(methods), planner, lengths)
