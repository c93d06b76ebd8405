"""Measures the time of steps in vLLM's V2 runner by batch size, draft tokens and context, through the engine itself.

The engine is opened in a process of its own, which has vLLM's scheduler in it: between runs, this module sets the
number of draft tokens that it schedules. Drafts are made and rejected, so their cost is included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from specplug.engines.vllm.configure import KEY, TIMING, V2_METHOD
from specplug.engines.vllm.environment import QUIET, preload
from specplug.engines.vllm.measure import TimedPass
from specplug.engines.vllm.v2.scheduled_lengths import use_lengths
from specplug.errors import EngineError

STEPS = 16
"""Steps that are timed of each kind, after those at the start of a run."""

STEPS_LINE = "STEPS "
"""The start of the lines in which the process with the engine reports."""

FIRST_STEPS = 4
"""Steps at the start of a run that are not timed: with asynchronous scheduling they overlap with the prompts."""


def timed_steps(
    model: str,
    settings: Mapping[str, Any],
    profile_ref: str,
    lengths: Sequence[int],
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    seconds: float,
    needed: Sequence[int] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> list[TimedPass]:
    """Times by run; what exceeds the engine's limits, or the seconds, is left out.

    settings     of `vllm.LLM`, without speculation
    profile_ref  the profile whose proposers draft
    lengths      draft tokens per sequence; none times an engine that does not speculate, as 0 draft tokens
    needed       batches that are timed at the first context, however long that takes
    EngineError, in one line, when vLLM does not start or fails.
    """
    task = {
        "model": model,
        "settings": dict(settings),
        "profile": profile_ref,
        "lengths": list(lengths),
        "batches": list(batches),
        "contexts": list(contexts),
        "seconds": seconds,
        "needed": list(needed),
    }
    runs = len(contexts) * len(batches) * max(1, len(lengths))
    done = 0
    with TemporaryDirectory(prefix="specplug-steps-") as folder:
        path, errors = Path(folder) / "task.json", Path(folder) / "errors.txt"
        path.write_text(json.dumps(task))
        command = [sys.executable, "-m", "specplug.engines.vllm.v2.timed_steps", str(path)]
        environment = {**os.environ, **QUIET, **preload(os.environ), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        steps: list[TimedPass] = []
        with errors.open("w") as stderr:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True)
            with child, killed_on_error(child):
                assert child.stdout is not None
                for line in child.stdout:
                    if line.startswith(STEPS_LINE):
                        found = json.loads(line.removeprefix(STEPS_LINE))
                        steps += [(one[0], one[1], one[2], one[3]) for one in found]
                        done += 1
                        progress(done / runs)
        lines = errors.read_text(errors="replace").splitlines()
    if child.returncode:
        reason = next((line for line in reversed(lines) if "Error" in line), f"exit code {child.returncode}")
        raise EngineError(f"vLLM could not be timed with {model}: {reason[:500]}")
    return steps


@contextmanager
def killed_on_error(child: subprocess.Popen[str]) -> Iterator[None]:
    """End a process that would go on after an interruption."""
    try:
        yield
    except BaseException:
        child.kill()
        raise


def steps_by_length(
    model: str,
    settings: Mapping[str, Any],
    profile_ref: str,
    most: int,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    seconds: tuple[float, float],
    needed: Sequence[int] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> list[TimedPass]:
    """As `timed_steps`: of an engine that does not speculate, as 0 draft tokens, and of one with 1 to `most`.

    seconds  for each of the two
    """
    timed: list[TimedPass] = []
    begin = 0.0
    for lengths, limit in zip(([], range(1, most + 1)), seconds, strict=True):
        share = max(1, len(lengths)) / (most + 1)
        timed += timed_steps(
            model,
            settings,
            profile_ref,
            lengths,
            batches=batches,
            contexts=contexts,
            seconds=limit,
            needed=needed,
            progress=partial(_report, progress, begin, share),
        )
        begin += share
    return timed


def _report(progress: Callable[[float], None], begin: float, share: float, done: float) -> None:
    """Report the progress in a part of the whole."""
    progress(begin + share * done)


def _main(task: Mapping[str, Any]) -> None:
    from vllm import LLM

    lengths = task["lengths"]
    settings = timing_settings(task["settings"], task["profile"], lengths, task["batches"])
    llm = LLM(task["model"], disable_log_stats=False, use_tqdm_on_load=False, **settings)
    began = perf_counter()
    runs = [
        (context, batch, length)
        for context in task["contexts"]
        for batch in task["batches"]
        for length in lengths or [0]
    ]
    longest: dict[tuple[int, int], float] = {}
    for context, batch, length in runs:
        left = task["seconds"] - (perf_counter() - began)
        is_needed = batch in task["needed"] and context == task["contexts"][0]
        if not is_needed and (left <= 0 or longest.get((batch, length), 0.0) > left):
            continue
        started = perf_counter()
        steps = timed_run(llm, batch, length, context)
        longest[batch, length] = perf_counter() - started
        print(STEPS_LINE + json.dumps(steps), flush=True)


def timing_settings(
    settings: Mapping[str, Any], profile_ref: str, lengths: Sequence[int], batches: Sequence[int]
) -> dict[str, Any]:
    """Settings of `vllm.LLM` for an engine whose steps are timed; without lengths, one that does not speculate."""
    common = {**settings, "max_num_seqs": max(len(lengths), *batches), "enable_prefix_caching": False}
    if not lengths:
        return common
    # vLLM captures graphs for every number of draft tokens that the schedule has.
    schedule = [[size, size, length] for size, length in enumerate(lengths, start=1)]
    config = {"num_speculative_tokens": max(lengths), "num_speculative_tokens_per_batch_size": schedule}
    ours = {KEY: {"profile": profile_ref, TIMING: True}}
    return {**common, "speculative_config": V2_METHOD | config, "additional_config": ours}


def timed_run(llm: Any, batch: int, length: int, context: int) -> list[TimedPass]:
    """Decode `batch` random prompts of `context` tokens, with `length` draft tokens in every step."""
    import numpy as np
    from vllm import SamplingParams

    engine = llm.llm_engine
    config = engine.vllm_config
    limit = config.model_config.max_model_len
    num_steps = FIRST_STEPS + STEPS
    if context + num_steps * (length + 1) > limit:
        return []
    if config.speculative_config is not None:
        use_lengths(llm, [(1, config.scheduler_config.max_num_seqs, length)])
    random = np.random.default_rng(context + batch)
    params = SamplingParams(temperature=0.0, max_tokens=num_steps, ignore_eos=True, detokenize=False)
    for number in range(batch):
        prompt = random.integers(0, config.model_config.get_vocab_size(), context).tolist()
        engine.add_request(f"{context}-{batch}-{length}-{number}", {"prompt_token_ids": prompt}, params)
    emitted: dict[str, int] = {}
    times: list[TimedPass] = []
    before = None
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if not outputs:
            continue
        now = perf_counter()
        complete = len(outputs) == batch and not any(one.finished for one in outputs)
        grown = [len(one.outputs[0].token_ids) for one in outputs]
        known = [emitted.get(one.request_id, 0) for one in outputs]
        if complete and before is not None and min(known) >= FIRST_STEPS:
            times.append((batch, length, context + sum(grown) / batch, 1000 * (now - before)))
        emitted |= {one.request_id: count for one, count in zip(outputs, grown, strict=True)}
        before = now if complete else None
    return times


if __name__ == "__main__":
    _main(json.loads(Path(sys.argv[1]).read_text()))
