"""Records the target's answers to a workload in a trace file: as many as time allows, beside those already in it.

This module depends on prompts, turns and the trace file. It reaches the engine only through a tuning subject.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from specplug.bench.workloads import Prompt
from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.machine.folders import cache_folder
from specplug.profile import Profile
from specplug.tune import trace as traces
from specplug.tune.budget import answers_to_record
from specplug.tune.subject import Subject
from specplug.tune.trace import TRACES, Answer, Trace
from specplug.tune.tune_request import Request, workload_hash

SLOTS = 8
"""Answers recorded at once: a plain pass over several sequences costs little more than over one."""

BATCH = 2 * SLOTS
"""Answers after which the file is written."""

TOPK = 16
"""Top ids recorded per position."""

TREE_NODES, TREE_TOKENS = 8, 2.2
"""Draft tokens of a tree, and the most tokens that a pass over such a tree emits with a method that learns from top ids
alone. Where such a pass takes longer than that number of plain passes, off-path rows are not recorded."""

Progress = Callable[[float], None]


def trace_about(
    fingerprint: Mapping[str, Any], profile: Profile, prompts: Sequence[Prompt], max_tokens: int, *, batched: bool
) -> dict[str, Any]:
    """The key of a trace: everything that decides which tokens are emitted.

    fingerprint  the result of `fingerprint.of`
    profile      with the engine's defaults filled in
    """
    runtime = profile.runtime
    return {
        "model": {key: fingerprint["model"][key] for key in ("bytes", "sample_sha256")},
        "versions": {key: value for key, value in fingerprint["versions"].items() if key != "specplug"},
        "workload": workload_hash(prompts),
        "max_tokens": max_tokens,
        "kv_type": runtime.kv_type,
        "flash_attention": runtime.flash_attention,
        "repack": runtime.repack,
        "exact": profile.exact,
        **({"dtype": profile.vllm.dtype} if batched else {}),
    }


def trace_path(about: Mapping[str, Any]) -> Path:
    """The file of the trace with this key."""
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / TRACES / f"{key}.npz"


def prompts_to_record(
    subject: Subject,
    request: Request,
    lengths: Mapping[str, Sequence[int]],
    seconds: float,
    *,
    prompt_ms: float,
    row_ms: Sequence[float],
) -> tuple[list[Prompt], int]:
    """The prompts to answer in so many seconds, in order, and the tokens of an answer; see `answers_to_record`.

    lengths    prompt tokens of every prompt, by category
    prompt_ms  time to read one token of a prompt
    row_ms     time of a pass, by rows
    """
    slots = _slots(subject)
    turns = max(len(prompt.turns) for prompt in request.prompts)
    token_ms = turns * row_ms[min(slots, len(row_ms)) - 1] / slots
    order, tokens = answers_to_record(
        lengths, request.max_tokens, seconds=seconds, prompt_ms=prompt_ms, token_ms=token_ms
    )
    by_category: dict[str, list[Prompt]] = {}
    for prompt in request.prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    return [by_category[category][index] for category, index in order], tokens


def need_off_path_rows(row_ms: Sequence[float]) -> bool:
    """Whether a method that learns from off-path rows could be faster than plain decoding at these costs."""
    return row_ms[min(TREE_NODES, len(row_ms) - 1)] < TREE_TOKENS * row_ms[0]


def trace_to_use(trace: Trace, planned: Sequence[Prompt], most_tokens: float) -> tuple[Trace, int]:
    """The planned answers and, up to `most_tokens` in total, others that an earlier tune recorded; and their number."""
    ids = {prompt.id for prompt in planned}
    kept, total, others = [], 0, 0
    for answer in trace.answers:
        other = answer.prompt_id not in ids
        if other and total > most_tokens:
            continue
        kept.append(answer)
        total += len(answer.tokens) - 1
        others += other
    return replace(trace, answers=tuple(kept)), others


def recorded_trace(path: Path, checksum: str) -> Trace:
    """The trace that an interrupted tune recorded. UsageError when the file is missing or has changed."""
    try:
        trace = traces.load(path)
    except traces.Damaged as error:
        raise UsageError(f"{error}; run without --resume to record again") from None
    if trace is None or traces.checksum(trace) != checksum:
        raise UsageError(f"{path}: this is not what the unfinished tune recorded; run without --resume to record again")
    return trace


def known_trace(path: Path, about: Mapping[str, Any], notify: Callable[[str], None]) -> Trace:
    """The trace in the file; an empty one where the file is missing, damaged or belongs to something else."""
    try:
        trace = traces.load(path)
    except traces.Damaged as error:
        notify(f"{error}; recording again")
        trace = None
    return trace if trace is not None and trace.about == about else Trace(about, ())


def record(
    subject: Subject,
    trace: Trace,
    prompts: Sequence[Prompt],
    path: Path,
    *,
    seconds: float,
    progress: Progress = lambda share: None,
) -> Trace:
    """The trace with greedy answers to all turns of `prompts`. The file is written after each batch.

    After `seconds` no further batch is started, but one batch is always recorded.
    """
    began = perf_counter()
    answered = {(answer.prompt_id, answer.turn): answer for answer in trace.answers}
    max_tokens: int = trace.about["max_tokens"]
    total = sum(len(prompt.turns) for prompt in prompts)
    new = 0

    def current() -> Trace:
        """The answers so far: those of `prompts` in order, then the others."""
        places = {prompt.id: place for place, prompt in enumerate(prompts)}
        found = [answer for key, answer in answered.items() if key[0] in places]
        found.sort(key=lambda answer: (places[answer.prompt_id], answer.turn))
        others = [answer for key, answer in answered.items() if key[0] not in places]
        return replace(trace, answers=(*found, *others))

    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        open_ = [p for p in prompts if turn < len(p.turns) and (p.id, turn) not in answered]
        for start in range(0, len(open_), BATCH):
            if new and perf_counter() - began > seconds:
                return current()
            part = [p for p in open_[start : start + BATCH] if not turn or (p.id, turn - 1) in answered]
            tokens = [subject.encode(_conversation(subject, p, turn, answered)) for p in part]

            def done(index: int, emitted: IntArray, topk: IntArray, part: Sequence[Prompt] = part,
                     tokens: Sequence[IntArray] = tokens, turn: int = turn) -> None:  # fmt: skip
                p = part[index]
                answered[p.id, turn] = Answer(p.id, turn, p.category, tokens[index], emitted, topk)
                progress(min(1.0, max(len(answered) / total, (perf_counter() - began) / max(seconds, 1e-9))))

            try:
                subject.record(tokens, max_tokens, TOPK, _slots(subject), done)
            finally:
                traces.save(current(), path)
            new += len(part)
    return current()


def record_off_path_rows(
    subject: Subject, trace: Trace, path: Path, *, seconds: float, progress: Progress = lambda share: None
) -> Trace:
    """The trace with off-path rows for as many of its answers as time allows, in order. The file is written, too."""
    began = perf_counter()
    answers = list(trace.answers)
    open_ = [i for i, answer in enumerate(answers) if answer.off_path_rows is None and len(answer.topk)]
    if not open_ or seconds <= 0:
        return trace
    try:
        for i, off_path_rows in zip(open_, subject.record_off_path_rows([answers[i] for i in open_]), strict=False):
            if off_path_rows is not None:
                answers[i] = replace(answers[i], off_path_rows=off_path_rows)
            progress(min(1.0, (perf_counter() - began) / seconds))
            if perf_counter() - began > seconds:
                break
    finally:
        trace = replace(trace, answers=tuple(answers))
        traces.save(trace, path)
    return trace


def _conversation(
    subject: Subject, prompt: Prompt, turn: int, answered: Mapping[tuple[str, int], Answer]
) -> list[dict[str, str]]:
    """The messages up to and including this turn, with the recorded answers to the earlier ones."""
    messages = []
    for earlier in range(turn):
        messages.append({"role": "user", "content": prompt.turns[earlier]})
        text = subject.text(answered[prompt.id, earlier].tokens.tolist())
        messages.append({"role": "assistant", "content": text})
    return [*messages, {"role": "user", "content": prompt.turns[turn]}]


def _slots(subject: Subject) -> int:
    """Answers at once; under `exact` one, as its passes are measured for one sequence."""
    return 1 if subject.profile.exact else SLOTS
