"""Predicts the speedup of candidates from recorded answers and the times of passes, without running them.

For one request at a time, the time of an answer is the sum of T(rows) over its passes, times its scale, plus as much
for each pass of the drafter. The scale says how long a plain pass of this answer takes, relative to the mean of all: a
pass over a long context takes longer, and answers with long contexts are often those in which lookup finds most. The
drafter reads the rows of every pass of the model, those of a lookup's drafts included; and where it is asked for a
draft, it has a pass for each draft token, and for one that it is unsure of. All its passes count alike.
Source: `process` and `draft` of common_speculative_impl_draft_simple in llama.cpp's common/speculative.cpp.

For several requests at a time, each pass has the rows of all of them: as many times the mean rows of one. Beyond the
rows that were measured, T is an assumption (see `PassTimes`); that prediction only orders candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from specplug.tune.server_flags.answer_replay import RecordedAnswer, Replayed, replayed, total
from specplug.tune.server_flags.drafter_guesses import AnswerGuesses, RecordedDrafter
from specplug.tune.server_flags.lookup_rules import Chain
from specplug.tune.server_flags.pass_times import PassTimes
from specplug.tune.server_flags.server_candidates import Candidate, open_rule


@dataclass(frozen=True, slots=True)
class Predicted:
    """A candidate's replay, and its speedup over plain decoding."""

    replay: Replayed
    speedup: float


def predicted(
    candidate: Candidate,
    answers: Sequence[RecordedAnswer],
    times: PassTimes,
    *,
    scales: Sequence[float] = (),
    level: int = 1,
    guesses: Mapping[str, Sequence[AnswerGuesses]] | None = None,
    drafter_ms: Mapping[str, float] | None = None,
) -> Predicted | None:
    """None for a candidate whose drafts cannot be known, and where only passes of one row were measured.

    scales    by answer; all 1 where empty
    guesses   by drafter's file
    drafter_ms
              milliseconds of a drafter's pass, by its file; drafters without are left out
    """
    replays = replay_of(candidate, answers, guesses)
    file = candidate.drafts.file if candidate.drafts is not None else None
    if replays is None or times.rows[-1] == 1 or (file is not None and file not in (drafter_ms or {})):
        return None
    own, scales = total(replays), scales or [1.0] * len(replays)
    ms = sum(scale * passes_ms(one, times, level) for scale, one in zip(scales, replays, strict=True))
    if file is not None:
        ms += own.drafter_passes * (drafter_ms or {})[file]
    plain = [replayed(answer, None) for answer in answers]
    plain_ms = sum(scale * passes_ms(one, times, level) for scale, one in zip(scales, plain, strict=True))
    return Predicted(own, plain_ms / ms if ms else 1.0)


def replay_of(
    candidate: Candidate,
    answers: Sequence[RecordedAnswer],
    guesses: Mapping[str, Sequence[AnswerGuesses]] | None = None,
) -> list[Replayed] | None:
    """By answer; None for a candidate whose drafts cannot be known. guesses: by drafter's file."""
    drafts = candidate.drafts
    if drafts is None:
        if not candidate.rules:
            return None
        rule = open_rule(candidate.rules)
        return [replayed(answer, rule, bounded=candidate.bounded) for answer in answers]
    known = (guesses or {}).get(drafts.file)
    if known is None:
        return None
    drafter = RecordedDrafter(known, drafts.length, drafts.least_probability)
    chain = Chain([open_rule(candidate.rules), drafter]) if candidate.rules else drafter
    replays = [replayed(answer, chain, bounded=candidate.bounded) for answer in answers]
    return [
        replace(replay, drafter_passes=drafting + replay.num_passes)
        for replay, drafting in zip(replays, drafter.passes, strict=True)
    ]


def passes_ms(replay: Replayed, times: PassTimes, level: int) -> float:
    """Milliseconds of all passes for one request, when `level` such requests run at once."""
    if level == 1 or not replay.num_passes:
        return times.of(replay)
    rows = sum(rows * count for rows, count in replay.passes.items()) / replay.num_passes
    return replay.num_passes * times.at(max(1, round(level * rows)))


def drafter_pass_ms(measured: Sequence[tuple[Replayed, float, float]], times: PassTimes) -> float:
    """Milliseconds of a drafter's pass: what its answers took beyond the passes of the target.

    measured  replays of answers, the milliseconds that the server took for them, and their scales
    """
    passes = sum(replay.drafter_passes for replay, _, _ in measured)
    beyond = sum(ms - scale * times.of(replay) for replay, ms, scale in measured)
    return max(0.0, beyond / passes) if passes else 0.0
