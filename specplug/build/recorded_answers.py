"""The target's greedy answers to prompts: those that an earlier build or tune has recorded, and others recorded now.

Reaches the engine through a `Source`, and does not depend on what the answers are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

from specplug.bench.workloads import Prompt
from specplug.build.source import Source
from specplug.errors import UsageError
from specplug.machine import fingerprint
from specplug.tune.recording import known_trace, record, trace_about, trace_path
from specplug.tune.trace import Answer

Stages = Callable[[str, float], None]
"""Receives the name of the stage, and the share of it that is done."""


def answers_of(
    source: Source,
    target: Path,
    workload: Sequence[Prompt],
    prompts: Sequence[Prompt],
    tokens: int,
    notify: Callable[[str], None],
    progress: Stages,
) -> list[Answer]:
    """The answers to all turns of `prompts`, those of one token left out. They are kept for later runs.

    workload  prompts under which answers are kept; `prompts` are some of them
    tokens    most tokens of an answer
    UsageError where all answers are empty.
    """
    engine = source.profile.engine
    here = fingerprint.of(target, engine=engine, threads=None, gpu=engine == "vllm")
    about = trace_about(here, source.profile, workload, tokens, batched=source.batched)
    path = trace_path(about)
    trace = known_trace(path, about, notify)
    known = {(answer.prompt_id, answer.turn) for answer in trace.answers}
    if any((prompt.id, turn) not in known for prompt in prompts for turn in range(len(prompt.turns))):
        progress("answers", 0.0)
        with source.answering() as subject:
            try:
                trace = record(
                    subject, trace, prompts, path, seconds=inf, progress=lambda share: progress("answers", share)
                )
            except KeyboardInterrupt:
                notify("the answers so far are saved: the same command goes on from there")
                raise
    wanted = {prompt.id for prompt in prompts}
    answers = [answer for answer in trace.answers if answer.prompt_id in wanted and len(answer.tokens) > 1]
    if not answers:
        raise UsageError(f"{target}: its answers to these prompts are empty; use other prompts")
    return answers
