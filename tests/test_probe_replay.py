"""The passes of a live answer whose text is not the recorded one; the expectations are counted by hand."""

import pytest

from specplug.subjects.subject import Question, Reply
from specplug.tune.server_flags.answer_replay import RecordedAnswer, Replayed
from specplug.tune.server_flags.probe_replay import counts_of, probe_entry, replay_of_probe
from specplug.tune.server_flags.recorded_questions import AskedQuestion, Recorded, Timed
from specplug.tune.server_flags.server_candidates import Candidate, Drafts, RuleSizes

LOOKUP = Candidate("lookup", "ngram-simple", (), (RuleSizes("ngram-simple", (1, 2)),))
DRAFTER = Candidate("d, 4 drafted", "d", (), (), Drafts("d", 4))
PLAIN = Recorded(
    AskedQuestion("q/0", "work", Question(({"role": "user", "content": "count"},), 16)),
    "1 2 3 4",
    Timed(3, 30.0, 5.0),
    RecordedAnswer((7, 8), (1, 2, 3, 4), 16),
)


def reply(text: str, ids: tuple[int, ...] | None, drafted: int, accepted: int, tokens: int = 0) -> Reply:
    return Reply(
        text,
        tokens or len(ids or ()),
        0.0,
        5.0,
        45.0,
        draft_tokens=drafted,
        accepted_tokens=accepted,
        prompt_ids=(7, 8),
        ids=ids,
        finish="length",
    )


def test_an_answer_with_the_recorded_text_is_the_recorded_one() -> None:
    entry = probe_entry(LOOKUP, PLAIN, reply("1 2 3 4", None, 0, 0, tokens=4))
    assert replay_of_probe(LOOKUP, PLAIN, entry, {}) == Replayed(4, 0, 0, {1: 3}), "nothing repeats in it"
    assert entry["name"] == "lookup"


def test_another_text_is_replayed_over_its_own_tokens() -> None:
    # five passes up to the second 1; behind it the draft "2 3" is right, and behind the second 4 "5 1" is not
    entry = probe_entry(LOOKUP, PLAIN, reply("another", (1, 2, 3, 4, 5, 1, 2, 3, 4, 6), 4, 2))
    assert replay_of_probe(LOOKUP, PLAIN, entry, {}) == Replayed(10, 4, 2, {1: 5, 3: 2})
    unknown = probe_entry(LOOKUP, PLAIN, reply("another", None, 4, 2, tokens=10))
    assert replay_of_probe(LOOKUP, PLAIN, unknown, {}) is None


def test_a_drafters_passes_of_another_text_are_those_that_the_server_counted() -> None:
    # 20 tokens behind the first, 9 of them accepted: 11 passes. 42 draft tokens are ten drafts of 4 and one of 2
    entry = probe_entry(DRAFTER, PLAIN, reply("another", None, 42, 9, tokens=21))
    found = replay_of_probe(DRAFTER, PLAIN, entry, {})
    assert found == Replayed(21, 42, 9, {5: 10, 3: 1}, drafter_passes=42 + 11)
    fewer = probe_entry(DRAFTER, PLAIN, reply("another", None, 8, 2, tokens=8))
    assert replay_of_probe(DRAFTER, PLAIN, fewer, {}) == Replayed(8, 8, 2, {5: 2, 1: 3}, drafter_passes=8 + 5)


@pytest.mark.parametrize(
    "probe",
    [
        Candidate("careful", "d", (), (), Drafts("d", 4, 0.5)),
        Candidate("chain", "d", (), (RuleSizes("ngram-simple", (1, 2)),), Drafts("d", 4)),
    ],
)
def test_drafts_of_unknown_lengths_say_nothing_of_another_text(probe: Candidate) -> None:
    assert replay_of_probe(probe, PLAIN, probe_entry(probe, PLAIN, reply("another", None, 8, 2, tokens=8)), {}) is None


def test_counts_are_known_where_every_answer_has_some() -> None:
    entries = [probe_entry(LOOKUP, PLAIN, reply("a", None, *one, tokens=9)) for one in ((5, 2), (3, 3))]
    assert counts_of(entries) == (8, 5)
    silent = probe_entry(LOOKUP, PLAIN, Reply("a", 9, 0.0, 5.0, 45.0))
    assert counts_of([*entries, silent]) is None
