"""What passes cost in vLLM on this machine, by sequences, rows and context, timed through the engine itself.

Knows how to open vLLM, and where its costs are remembered. Knows no proposer but the one that sweeps.
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
from platformdirs import user_cache_dir

from specplug.engines.vllm.configure import NAME
from specplug.engines.vllm.environment import MEMORY_FLAG
from specplug.engines.vllm.timing_proposer import KEY
from specplug.errors import SpecplugError
from specplug.machine import fingerprint, hardware
from specplug.machine.files import write_atomically
from specplug.profile import CostPoints, Measured, Profile

SCHEMA = 2
SECONDS = 100.0
"""Time for all of it, starting the engine excluded; larger batches and contexts are left out when it is over."""

CONTEXTS = (256, 1024)
BATCHES = (1, 4, 16, 64)
ROUNDS, FEWER_ROUNDS, MANY = 12, 6, 16
"""Passes of every length, per batch and context, and from how many sequences on fewer are enough: a pass over many is
slow, and its time varies less."""

Pass = tuple[int, int, float, float]
"""Sequences, guesses for each, tokens in their caches on average, milliseconds."""

WARM = 2
"""Rounds before those that count: an engine's first passes of a shape are slow."""


def with_costs(
    profile: Profile,
    model: str,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    notify: Callable[[str], None] = lambda text: None,
) -> Profile:
    """The profile with cost curves of this machine: its own, remembered ones, or measured now. Imports vllm for that.

    settings  how the engine is opened, but for speculation; costs belong to them, too, except that every batch size is
              measured, whatever the most is to be
    folder    where the model's files are
    """
    settings = {key: value for key, value in settings.items() if key != "max_num_seqs"}
    decisive = {key: value for key, value in settings.items() if key != MEMORY_FLAG}
    here = fingerprint.of(folder, engine=NAME, threads=None, gpu=True)
    if profile.measured is not None and profile.measured.batch_curves:
        changed = fingerprint.changes(profile.measured.hardware, here)
        if not changed:
            return profile
        notify(f"profile {profile.name} was measured under other conditions ({'; '.join(changed)}); measuring again")
    length = profile.vllm.num_speculative_tokens
    key = hashlib.sha256(
        json.dumps([SCHEMA, here, decisive, length], sort_keys=True, default=str).encode()
    ).hexdigest()[:16]
    path = Path(user_cache_dir("specplug")) / "cost" / f"vllm-{key}.json"
    curves = _remembered(path)
    if not curves:
        notify(f"measuring what a pass costs here: once, about {SECONDS:.0f} s after vLLM has started")
        busy = hardware.busy_warning()
        if busy:
            notify(busy)
        timed = passes(model, settings, length, batches=BATCHES, contexts=CONTEXTS, seconds=SECONDS)
        curves = curves_of(timed, CONTEXTS, length)
        try:
            write_atomically(path, json.dumps([asdict(curve) for curve in curves]).encode())
        except SpecplugError as error:
            notify(f"costs are measured again next time: {error}")
    acceptance = profile.measured.acceptance if profile.measured else {}
    return replace(profile, measured=Measured(here, None, acceptance, curves))


def curves_of(timed: Sequence[Pass], contexts: Sequence[int], length: int) -> tuple[CostPoints, ...]:
    """A curve per batch size, from one guess-less pass to `length` guesses for each: the medians."""
    return tuple(
        CostPoints(
            whole,
            rows_of(sequences, length),
            tuple(tuple(round(median(times), 4) for times in line) for line in lines),
            sequences,
        )
        for sequences, whole, lines in by_batch(timed, contexts, length)
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
) -> list[Pass]:
    """Passes of random text through vLLM's own scheduler, timed one by one; what does not fit is left out.

    SpecplugError when the engine never got to one.

    needed  batches that are timed at the first context however long it takes
    """
    from specplug.engines.vllm.offline import open_llm

    with TemporaryDirectory() as folder:
        path = Path(folder) / "passes.jsonl"
        sweep = {
            "speculative_config": {
                "method": "custom_class",
                "model": "specplug.engines.vllm.timing_proposer.SweepProposer",
                "num_speculative_tokens": length,
            },
            "additional_config": {KEY: str(path)},
            "enable_prefix_caching": False,
        }
        with open_llm(model, {**settings, **sweep}) as (llm, _):
            _run(llm, length, batches, contexts, seconds, needed, progress)
        timed = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    timed = [one for one in timed if one[0] in batches]  # the end of a batch, or what found no room
    if not by_batch(timed, contexts, length):
        raise SpecplugError(f"{model}: vLLM made no pass that could be timed; raise max_model_len")
    return timed


def by_batch(
    timed: Sequence[Pass], contexts: Sequence[int], length: int
) -> list[tuple[int, tuple[int, ...], list[list[list[float]]]]]:
    """Per number of sequences: contexts that were measured whole, and for each of them the times of every row count.

    Row counts are those of `rows_of`. WARM rounds are left out.
    """
    seen: dict[tuple[int, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sequences, guesses, tokens, ms in timed:
        context = min(contexts, key=lambda c: abs(c - tokens))
        seen[sequences, context][guesses].append(ms)
    found = []
    for sequences in sorted({batch for batch, _ in seen}):
        whole = [
            context
            for context in sorted(contexts)
            if len(seen[sequences, context]) == length + 1
            and all(len(times) > WARM for times in seen[sequences, context].values())
        ]
        lines = []
        for context in whole:
            line = [seen[sequences, context][k][WARM:] for k in range(length + 1)]
            lines.append(line if sequences == 1 else [line[0], *line])
        if whole:
            found.append((sequences, tuple(whole), lines))
    return found


def rows_of(sequences: int, length: int) -> tuple[int, ...]:
    """From no guess to `length` for each. Fewer rows than sequences never come, but a curve starts at one."""
    rows = tuple(sequences * (1 + k) for k in range(length + 1))
    return rows if sequences == 1 else (1, *rows)


def _run(
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
    longest, most = config.model_config.max_model_len, config.scheduler_config.max_num_seqs
    vocabulary = config.model_config.get_vocab_size()
    random = np.random.default_rng(0)
    began = perf_counter()
    took: dict[int, float] = {}  # seconds per pass by batch, reading included
    for place, context in enumerate(contexts):
        for batch in batches:
            passes = ((FEWER_ROUNDS if batch >= MANY else ROUNDS) + WARM + 1) * (length + 1)
            if batch > most or context + passes > longest:
                continue
            left = seconds - (perf_counter() - began)
            like = max((size for size in took if size <= batch), default=batch)
            expected = took.get(like, 0.0) * batch / like * passes
            if expected > left and (place or batch not in needed):
                continue
            started = perf_counter()
            prompts = [
                TokensPrompt(prompt_token_ids=random.integers(0, vocabulary, context).tolist()) for _ in range(batch)
            ]
            params = SamplingParams(temperature=0.0, max_tokens=passes, ignore_eos=True, detokenize=False)
            llm.generate(prompts, params, use_tqdm=False)
            took[batch] = (perf_counter() - started) / passes
            progress(min(1.0, (perf_counter() - began) / seconds))


def _remembered(path: Path) -> tuple[CostPoints, ...]:
    try:
        lines = json.loads(path.read_text())
        return tuple(
            CostPoints(tuple(line["contexts"]), tuple(line["rows"]), tuple(map(tuple, line["ms"])), line["sequences"])
            for line in lines
        )
    except (OSError, ValueError, LookupError, TypeError):
        return ()
