"""The times of answers that are asked at once, of a candidate's server and of the plain one.

Starts the plain server again where it fails, and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from specplug.errors import SpecplugError
from specplug.subjects.simultaneous import ask_at_once
from specplug.subjects.subject import Question, RefusedQuestion, Subject, SubjectError
from specplug.tune.server_flags.live_servers import LiveServers
from specplug.tune.server_flags.recorded_questions import AskedQuestion, Timed, timed

WARM_TOKENS = 4
"""Of the answer with which a prompt gets into a server's cache. Fewer may have no text yet."""


def answers_of(subject: Subject, group: Sequence[AskedQuestion]) -> list[Timed]:
    """The times of a group of answers, after each prompt was read once: prompt caches are warm in every server."""
    ask_at_once(subject, [_shortest(one.question) for one in group])
    return [timed(reply) for reply in ask_at_once(subject, [one.question for one in group])]


def plain_answers(servers: LiveServers, group: Sequence[AskedQuestion]) -> list[Timed]:
    """Those of plain decoding; its server is started again once where it fails. SpecplugError where it fails again, and
    RefusedQuestion where it refuses."""
    try:
        return answers_of(servers.plain(), group)
    except RefusedQuestion:
        raise
    except SubjectError:
        try:
            return answers_of(servers.restart_plain(), group)
        except RefusedQuestion:
            raise
        except SubjectError as error:
            raise SpecplugError(f"plain decoding cannot be measured: {error}") from None


def _shortest(question: Question) -> Question:
    return replace(question, max_tokens=WARM_TOKENS)
