"""Measures the cost of a pass in vLLM on this machine by sequences, rows and context, through the engine itself.

It opens vLLM with `TimingProposer`, which drafts every length in turn, and keeps the results in the user's cache. It
does not depend on the proposers that will use the costs.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from specplug.engines.vllm.configure import NAME
from specplug.engines.vllm.engine_process import open_llm
from specplug.engines.vllm.environment import MEMORY_FLAG
from specplug.engines.vllm.timing_proposer import KEY
from specplug.errors import SpecplugError
from specplug.machine import fingerprint, hardware
from specplug.machine.files import write_atomically
from specplug.machine.folders import cache_folder
from specplug.profile import CostPoints, Measured, Profile

PROPOSER = "specplug.engines.vllm.timing_proposer.TimingProposer"
"""The value of `speculative_config.model` for `method: custom_class`."""

SCHEMA = 2

MEASURE_SECONDS = 100.0
"""Time for all measurements, excluding the start of the engine. Batches and contexts that do not fit are left out."""

CONTEXTS = (256, 1024)
"""Tokens per sequence in the KV cache at the start of a measurement."""

BATCHES = (1, 4, 16, 64)
"""Numbers of sequences."""

ROUNDS = 12
"""Passes of every draft length, for each batch and context."""

LARGE_BATCH, LARGE_BATCH_ROUNDS = 16, 6
"""From this number of sequences on, fewer rounds are enough: a pass is slow, and its time varies less."""

WARMUP_ROUNDS = 2
"""Rounds before those that count: an engine's first passes of a shape are slow."""

TimedPass = tuple[int, int, float, float]
"""Sequences, draft tokens per sequence, mean tokens per sequence in the KV cache, milliseconds."""


def with_costs(
    profile: Profile,
    model: str,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    notify: Callable[[str], None] = lambda text: None,
) -> Profile:
    """The profile with cost curves of this machine: its own, those in the cache, or new ones, measured with vLLM.

    settings  how the engine is opened, without speculation. The costs depend on all of them but `max_num_seqs`, since
              every batch size is measured
    folder    the folder of the model's files
    """
    settings = {key: value for key, value in settings.items() if key != "max_num_seqs"}
    relevant = {key: value for key, value in settings.items() if key != MEMORY_FLAG}
    here = fingerprint.of(folder, engine=NAME, threads=None, gpu=True)
    if profile.measured is not None and profile.measured.batch_curves:
        changed = fingerprint.changes(profile.measured.hardware, here)
        if not changed:
            return profile
        notify(f"profile {profile.name} was measured under other conditions ({'; '.join(changed)}); measuring again")
    length = profile.vllm.num_speculative_tokens

    def measured() -> tuple[CostPoints, ...]:
        timed = passes(model, settings, length, batches=BATCHES, contexts=CONTEXTS, seconds=MEASURE_SECONDS)
        return curves_of(timed, CONTEXTS, length)

    curves = remembered_curves([SCHEMA, here, relevant, length], measured, notify)
    acceptance = profile.measured.acceptance if profile.measured else {}
    return replace(profile, measured=Measured(here, None, acceptance, curves))


def remembered_curves(
    key: Sequence[Any],
    measure: Callable[[], tuple[CostPoints, ...]],
    notify: Callable[[str], None],
    *,
    starts: int = 1,
) -> tuple[CostPoints, ...]:
    """The curves in the user's cache that were measured under `key`; where there are none, new ones.

    starts  how often measuring starts vLLM, each time to measure for MEASURE_SECONDS
    """
    digest = hashlib.sha256(json.dumps(list(key), sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = cache_folder() / "cost" / f"vllm-{digest}.json"
    curves = _cached_curves(path)
    if curves:
        return curves
    after = "after vLLM starts" if starts == 1 else f"after each of {starts} starts of vLLM"
    notify(f"measuring the cost of passes on this machine (once; about {MEASURE_SECONDS:.0f} s {after})")
    busy = hardware.busy_warning()
    if busy:
        notify(busy)
    curves = measure()
    try:
        write_atomically(path, json.dumps([asdict(curve) for curve in curves]).encode())
    except SpecplugError as error:
        notify(f"the measured costs could not be saved and will be measured again next time: {error}")
    return curves


def curves_of(timed: Sequence[TimedPass], contexts: Sequence[int], length: int) -> tuple[CostPoints, ...]:
    """One curve per number of sequences: the median times of drafts from no token to `length` tokens per sequence."""
    return tuple(
        CostPoints(
            complete,
            rows_of(sequences, length),
            tuple(tuple(round(median(times), 4) for times in line) for line in lines),
            sequences,
        )
        for sequences, complete, lines in by_batch(timed, contexts, length)
    )


def passes(
    model: str,
    settings: Mapping[str, Any],
    length: int,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    seconds: float,
    needed: Sequence[int] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> list[TimedPass]:
    """Run random text through vLLM's own scheduler and time each pass; what exceeds the engine's limits is left out.

    length  the longest draft per sequence, in tokens
    needed  batches that are timed at the first context, however long that takes
    SpecplugError when no pass could be timed.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "passes.jsonl"
        timing = {
            "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": length},
            "additional_config": {KEY: str(path)},
            "enable_prefix_caching": False,
        }
        with open_llm(model, {**settings, **timing}) as (llm, _):
            _run_batches(llm, length, batches, contexts, seconds, needed, progress)
        timed = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    # At the end of a batch, or when the cache is full, passes have other numbers of sequences.
    timed = [one for one in timed if one[0] in batches]
    if not by_batch(timed, contexts, length):
        raise SpecplugError(f"{model}: vLLM completed no pass that could be timed; raise max_model_len")
    return timed


def by_batch(
    timed: Sequence[TimedPass], contexts: Sequence[int], length: int
) -> list[tuple[int, tuple[int, ...], list[list[list[float]]]]]:
    """Per number of sequences: the contexts measured completely, and for each the times by row count.

    The row counts are those of `rows_of`. The first WARMUP_ROUNDS rounds are left out.
    """
    seen: dict[tuple[int, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sequences, num_drafted, tokens, ms in timed:
        context = min(contexts, key=lambda c: abs(c - tokens))
        seen[sequences, context][num_drafted].append(ms)
    points = []
    for sequences in sorted({batch for batch, _ in seen}):
        complete = [
            context
            for context in sorted(contexts)
            if len(seen[sequences, context]) == length + 1
            and all(len(times) > WARMUP_ROUNDS for times in seen[sequences, context].values())
        ]
        lines = []
        for context in complete:
            line = [seen[sequences, context][k][WARMUP_ROUNDS:] for k in range(length + 1)]
            lines.append(line if sequences == 1 else [line[0], *line])
        if complete:
            points.append((sequences, tuple(complete), lines))
    return points


def rows_of(sequences: int, length: int) -> tuple[int, ...]:
    """Row counts of a curve: drafts from no token to `length` tokens per sequence.

    A pass never has fewer rows than sequences, but a curve has to start at one row.
    """
    rows = tuple(sequences * (1 + k) for k in range(length + 1))
    return rows if sequences == 1 else (1, *rows)


def _run_batches(
    llm: Any,
    length: int,
    batches: Sequence[int],
    contexts: Sequence[int],
    seconds: float,
    needed: Sequence[int],
    progress: Callable[[float], None],
) -> None:
    from vllm import SamplingParams, TokensPrompt

    config = llm.llm_engine.vllm_config
    max_length, max_batch = config.model_config.max_model_len, config.scheduler_config.max_num_seqs
    vocabulary = config.model_config.get_vocab_size()
    random = np.random.default_rng(0)
    began = perf_counter()
    pass_seconds: dict[int, float] = {}  # by batch, including the time for prompts
    for place, context in enumerate(contexts):
        for batch in batches:
            rounds = LARGE_BATCH_ROUNDS if batch >= LARGE_BATCH else ROUNDS
            num_passes = (rounds + WARMUP_ROUNDS + 1) * (length + 1)
            if batch > max_batch or context + num_passes > max_length:
                continue
            left = seconds - (perf_counter() - began)
            nearest = max((size for size in pass_seconds if size <= batch), default=batch)
            expected = pass_seconds.get(nearest, 0.0) * batch / nearest * num_passes
            if expected > left and (place or batch not in needed):
                continue
            started = perf_counter()
            prompts = [
                TokensPrompt(prompt_token_ids=random.integers(0, vocabulary, context).tolist()) for _ in range(batch)
            ]
            params = SamplingParams(temperature=0.0, max_tokens=num_passes, ignore_eos=True, detokenize=False)
            llm.generate(prompts, params, use_tqdm=False)
            pass_seconds[batch] = (perf_counter() - started) / num_passes
            progress(min(1.0, (perf_counter() - began) / seconds))


def _cached_curves(path: Path) -> tuple[CostPoints, ...]:
    try:
        lines = json.loads(path.read_text())
        return tuple(
            CostPoints(tuple(line["contexts"]), tuple(line["rows"]), tuple(map(tuple, line["ms"])), line["sequences"])
            for line in lines
        )
    except (OSError, ValueError, LookupError, TypeError):
        return ()
