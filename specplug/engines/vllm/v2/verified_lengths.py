"""Fills a profile's draft tokens by batch size for the V2 runner from measured times of steps.

It is for machines where vLLM cannot choose them itself, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from specplug.engines.vllm.configure import NAME
from specplug.engines.vllm.environment import MEMORY_FLAG
from specplug.engines.vllm.measure import (
    BATCHES,
    CONTEXTS,
    MEASURE_SECONDS,
    curves_of,
    remembered_curves,
)
from specplug.engines.vllm.v2.timed_steps import steps_by_length
from specplug.machine import fingerprint
from specplug.planning.batch_size_schedule import MOST_SEQUENCES, expected_tokens, in_words, lengths_of, ranges_of
from specplug.profile import CostPoints, Profile
from specplug.registry import ProposerSpec

SCHEMA = "v2-1"


def with_verified_lengths(
    profile: Profile,
    model: str,
    settings: Mapping[str, Any],
    folder: Path,
    profile_ref: str,
    *,
    notify: Callable[[str], None] = lambda text: None,
) -> Profile:
    """The profile with `tokens_per_batch_size`, or without proposers where no number of draft tokens pays.

    It follows from times in the user's cache, or new ones, and from `expected_tokens`.

    settings     how the engine is opened, without speculation
    folder       the folder of the model's files
    profile_ref  a path of the profile that each worker can read
    """
    most = profile.vllm.num_speculative_tokens
    settings = {key: value for key, value in settings.items() if key != "max_num_seqs"}
    relevant = {key: value for key, value in settings.items() if key != MEMORY_FLAG}
    here = fingerprint.of(folder, engine=NAME, threads=None, gpu=True)
    methods = [(spec.method, dict(spec.options)) for spec in profile.proposers]

    def measured() -> tuple[CostPoints, ...]:
        timed = steps_by_length(
            model,
            settings,
            profile_ref,
            most,
            batches=BATCHES,
            contexts=CONTEXTS,
            seconds=(MEASURE_SECONDS, MEASURE_SECONDS),
        )
        return curves_of(timed, CONTEXTS, most)

    curves = remembered_curves([SCHEMA, here, relevant, most, methods], measured, notify, starts=2)
    tokens = expected_tokens([spec.method for spec in profile.proposers], most)
    ranges = ranges_of(lengths_of(curves, tokens), profile.vllm.max_num_seqs or MOST_SEQUENCES)
    if not any(length for _, _, length in ranges):
        notify("no number of draft tokens is expected to save time here, so vLLM runs without specplug's proposers")
        return replace(profile, proposers=(ProposerSpec("none"),))
    notify(f"draft tokens by the number of running sequences: {in_words(ranges)}; specplug bench shows what they gain")
    return replace(profile, vllm=replace(profile.vllm, tokens_per_batch_size=ranges))
