"""Of which passes a live answer consisted that was asked for to learn what passes cost.

A server that verifies drafts can write another text than without: with several rows it rounds in another way, and two
tokens are sometimes as likely. Knows recorded answers and journal entries; asks nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specplug.subjects.subject import Reply
from specplug.tune.server_flags.answer_replay import Replayed
from specplug.tune.server_flags.drafter_guesses import AnswerGuesses
from specplug.tune.server_flags.recorded_questions import Recorded, Timed, as_entry, from_entry
from specplug.tune.server_flags.server_candidates import Candidate
from specplug.tune.server_flags.server_predictions import replay_of


def probe_entry(probe: Candidate, one: Recorded, reply: Reply) -> dict[str, Any]:
    """A live answer of a probe as plain data for the journal."""
    return {"name": probe.name, **as_entry(one.asked.key, reply)}


def replay_of_probe(
    probe: Candidate, one: Recorded, entry: Mapping[str, Any], guesses: Mapping[str, AnswerGuesses]
) -> Replayed | None:
    """By the recorded text where it is the same, else by the answer's own tokens; None where neither is known.

    guesses  of drafters along the recorded answer, by file. Of another text they are not known, so a drafter's passes
             come from what the server counted, where each of its drafts is as long as the next
    """
    if entry["text"] == one.text and one.tokens is not None:
        found = replay_of(probe, [one.tokens], {file: [known] for file, known in guesses.items()})
        return found[0] if found else None
    if probe.drafts is not None:
        return _counted(probe, Timed(*entry["timed"]))
    own = from_entry(one.asked, entry).tokens
    found = replay_of(probe, [own]) if own is not None else None
    return found[0] if found else None


def counts_of(entries: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Draft tokens and accepted ones, as the server counted them; None where it did not."""
    answers = [Timed(*entry["timed"]) for entry in entries]
    drafted = [one.drafted for one in answers if one.drafted is not None]
    if len(drafted) < len(answers):
        return None
    return sum(drafted), sum(one.accepted or 0 for one in answers)


def _counted(probe: Candidate, answer: Timed) -> Replayed | None:
    """Every draft has all its tokens, and the last one the rest."""
    if probe.drafts is None or probe.rules or probe.drafts.least_probability or answer.drafted is None:
        return None
    accepted = answer.accepted or 0
    passes = answer.tokens - accepted
    full, rest = divmod(answer.drafted, probe.drafts.length)
    plain = passes - full - bool(rest)
    if passes < 1 or plain < 0:
        return None
    by_rows = {1 + probe.drafts.length: full, 1: plain, **({1 + rest: 1} if rest else {})}
    by_rows = {rows: count for rows, count in by_rows.items() if count}
    return Replayed(answer.tokens + 1, answer.drafted, accepted, by_rows, drafter_passes=answer.drafted + passes)
