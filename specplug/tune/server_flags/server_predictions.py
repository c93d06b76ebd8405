"""Predicts the speedup of candidates from recorded answers and the times of passes, without running them.

For one request at a time, the time of a candidate is the sum of T(rows) over its passes, plus what its drafter takes
for every draft token. For several at a time, each pass has the rows of all requests: as many times the mean rows of
one. Beyond the rows that were measured, T is an assumption (see `PassTimes`); that prediction only orders candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from specplug.tune.server_flags.answer_replay import RecordedAnswer, Replayed, replayed, total
from specplug.tune.server_flags.drafter_guesses import AnswerGuesses, RecordedDrafter
from specplug.tune.server_flags.lookup_rules import Chain, LookupRule
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
    level: int = 1,
    guesses: Mapping[str, Sequence[AnswerGuesses]] | None = None,
    token_ms: Mapping[str, float] | None = None,
) -> Predicted | None:
    """None for a candidate whose drafts cannot be known.

    guesses   by drafter's file
    token_ms  of a drafter, by its file: milliseconds for a draft token; drafters without are left out
    """
    rule = _rule(candidate, guesses or {})
    file = candidate.drafts.file if candidate.drafts is not None else None
    if rule is None or (file is not None and file not in (token_ms or {})):
        return None
    own = total(replayed(answer, rule, bounded=candidate.bounded) for answer in answers)
    plain = total(replayed(answer, None) for answer in answers)
    ms = passes_ms(own, times, level) + (own.drafted * (token_ms or {})[file] if file is not None else 0.0)
    return Predicted(own, passes_ms(plain, times, level) / ms if ms else 1.0)


def passes_ms(replay: Replayed, times: PassTimes, level: int) -> float:
    """Milliseconds of all passes for one request, when `level` such requests run at once."""
    if level == 1 or not replay.num_passes:
        return times.of(replay)
    rows = sum(rows * count for rows, count in replay.passes.items()) / replay.num_passes
    return replay.num_passes * times.at(max(1, round(level * rows)))


def drafter_token_ms(measured: Sequence[tuple[Replayed, float]], times: PassTimes) -> float:
    """Milliseconds that a drafter takes for a draft token: what its answers took beyond the passes of the target.

    measured  replays of answers, and the milliseconds that the server took for them
    """
    drafted = sum(replay.drafted for replay, _ in measured)
    beyond = sum(ms - times.of(replay) for replay, ms in measured)
    return max(0.0, beyond / drafted) if drafted else 0.0


def _rule(candidate: Candidate, guesses: Mapping[str, Sequence[AnswerGuesses]]) -> LookupRule | None:
    drafts = candidate.drafts
    if drafts is None:
        return open_rule(candidate.rules) if candidate.rules else None
    if drafts.file not in guesses:
        return None
    drafter = RecordedDrafter(guesses[drafts.file], drafts.length, drafts.least_probability)
    return Chain([open_rule(candidate.rules), drafter]) if candidate.rules else drafter


def replay_of(
    candidate: Candidate,
    answers: Sequence[RecordedAnswer],
    guesses: Mapping[str, Sequence[AnswerGuesses]] | None = None,
) -> list[Replayed] | None:
    """By answer; None for a candidate whose drafts cannot be known."""
    rule = _rule(candidate, guesses or {})
    if rule is None:
        return None
    return [replayed(answer, rule, bounded=candidate.bounded) for answer in answers]
